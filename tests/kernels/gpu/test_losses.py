"""Losses, scores and errors of states as GPUs find them, by Triton's interpreter, beside torch's, against float64."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import losses as seam
from llmqat.kernels.gpu import available, losses
from llmqat.kernels.gpu.tiles import Tile
from llmqat.metrics.scores import token_scores
from llmqat.models.output_head import BelowHead
from llmqat.train.losses import ce_loss, chunk_losses, hidden_loss, kd_loss, state_errors, token_losses
from tests.kernels.test_losses import DTYPES, error, exact, pair
from tests.pretended_device import PRETENDED

SHORT = Tile(1, 512, 1)  # so that a row of a test has several


# One number; a tile and a tail.
@pytest.mark.parametrize("width", [1, 700])
@pytest.mark.parametrize("apart", [4.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", ["teacher", "ids"])
def test_losses_of_tokens_are_as_exact_as_those_of_torch(of, dtype, apart, width):
    logits, teacher = pair(3, width, dtype, apart)
    targets = teacher if of == "teacher" else torch.arange(3) * 7 % width
    loss, gradient = exact(logits, targets)
    by_torch = token_losses(logits, targets)
    own = torch.full_like(logits, torch.nan)
    found = losses.token_losses(logits, targets, 0.25, own, SHORT)
    # One rounding is allowed where torch has none.
    assert error(found, loss) <= 1.5 * error(by_torch[0], loss) + 2e-7 * loss.norm().item()
    rounded = (by_torch[1] / 4).to(dtype)
    assert error(own, gradient / 4) <= 1.5 * error(rounded, gradient / 4) + 2e-8 * gradient.norm().item()
    losses.token_losses(logits, targets, 0.25, logits, SHORT)
    assert torch.equal(logits, own), "in place of the logits"


def test_without_a_gradient_the_loss_is_the_same_and_repeats():
    logits, teacher = pair(3, 700, torch.bfloat16, 1.0)
    for targets in (teacher, torch.arange(3)):
        own = torch.empty_like(logits)
        found = losses.token_losses(logits, targets, 1.0, own, SHORT)
        assert torch.equal(losses.token_losses(logits, targets, 1.0, None, SHORT), found)


@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_divergence_near_zero_does_not_cancel(apart):
    logits, teacher = pair(3, 2000, torch.float32, apart)
    loss, gradient = exact(logits, teacher)
    own = torch.empty_like(logits)
    found = losses.token_losses(logits, teacher, 1.0, own)
    assert error(found, loss) < 1e-5 * loss.norm()
    assert error(own, gradient) < 1e-2 * gradient.norm()
    assert not losses.token_losses(teacher, teacher, 1.0, own).any()
    assert not own.any()


@pytest.mark.parametrize("of", ["teacher", "ids"])
def test_logits_far_from_zero_do_not_overflow(of):
    logits, teacher = pair(3, 100, torch.float32, 300.0)
    targets = 100 * teacher if of == "teacher" else torch.arange(3)
    loss, gradient = exact(logits, targets)
    own = torch.empty_like(logits)
    torch.testing.assert_close(losses.token_losses(logits, targets, 1.0, own), loss.float())
    torch.testing.assert_close(own, gradient.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("of", ["teacher", "ids"])
def test_values_that_are_not_finite_do_to_a_token_what_they_do_in_torch(of, value):
    logits, teacher = pair(4, 700, torch.float32, 1.0)
    logits[1, 699] = teacher[2, 600] = value
    logits[3] = value  # words that are all ruled out, too
    targets = teacher if of == "teacher" else torch.arange(4)
    own = torch.empty_like(logits)
    found, expected = losses.token_losses(logits, targets, 1.0, own, SHORT), token_losses(logits, targets)
    torch.testing.assert_close(found, expected[0], equal_nan=True)
    torch.testing.assert_close(own, expected[1], equal_nan=True)


def test_words_ruled_out_have_no_probability():
    """Cross-entropy of logits of which some are minus infinity, whole tiles of a row among them."""
    logits = pair(2, 2100, torch.float32, 1.0)[0]
    logits[:, :1030] = -torch.inf
    own, ids = torch.empty_like(logits), torch.tensor([1500, 2099])
    found = losses.token_losses(logits, ids, 1.0, own, SHORT)
    loss, gradient = exact(logits, ids)
    torch.testing.assert_close(found, loss.float())
    torch.testing.assert_close(own, gradient.float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("id_", [-100, 8, 2**40])
def test_ids_beyond_the_vocabulary_spoil_their_token(id_):
    """Whoever looks at the loss sees it, as every step of training does; nobody has to wait."""
    logits, ids = torch.zeros(3, 8), torch.tensor([0, id_, 7])
    own = torch.empty_like(logits)
    found = losses.token_losses(logits, ids, 1.0, own)
    assert found.isnan().tolist() == own.isnan().all(-1).tolist() == [False, True, False]
    assert own[[0, 2]].isfinite().all()
    assert losses.token_scores(logits, ids)[0].isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("apart", [1.0, 0.01])
def test_scores_are_as_near_to_float64_as_those_of_torch(apart, dtype):
    logits, teacher = pair(4, 1300, dtype, apart)
    logits[0], teacher[0] = 0, 0
    logits[0, [542, 30]] = teacher[0, [1200, 30]] = 2.0  # the first of the largest counts, also where one lane has both
    following = torch.arange(4) * 31 % 1300
    expected = torch.stack([exact(logits, following)[0], exact(logits, teacher)[0]])
    by_torch = token_scores(logits, following, teacher)
    found = losses.token_scores(logits, following, teacher, SHORT)
    for own, theirs, right in zip(found[:2], by_torch[:2], expected, strict=True):
        assert error(own, right) <= 1.5 * error(theirs, right) + 2e-7 * right.norm().item()
    assert torch.equal(found[2], by_torch[2])
    assert found[2, 0] == 1
    alone = losses.token_scores(logits, following, None, SHORT)
    assert torch.equal(alone, torch.stack([found[0], torch.zeros(4), torch.zeros(4)]))


# A part of a tile; several and a tail.
@pytest.mark.parametrize("width", [1, 300])
@pytest.mark.parametrize(("dtype", "target_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.bfloat16, DTYPES[0])])
def test_errors_of_states_are_as_exact_as_those_of_torch(width, dtype, target_dtype):
    states, targets = pair(14, width, dtype, 0.1)
    states, targets, factors = states.view(2, 7, width), targets.to(target_dtype).view(2, 7, width), torch.rand(2, 7)
    factors[0, 3] = 0
    leaf = states.double().requires_grad_()
    each = (leaf - targets.double()).square().sum(-1) / targets.double().square().sum(-1)
    gradient = torch.autograd.grad((each * factors).sum(), leaf)[0]
    by_torch = state_errors(states, targets, factors)
    found = losses.state_errors(states, targets, factors, Tile(8, 128, 4))
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert error(found[0], each.detach()) <= 1.5 * error(by_torch[0], each.detach()) + 2e-7 * each.norm().item()
    assert error(found[1], gradient) <= 1.5 * error(by_torch[1], gradient) + 1e-7 * gradient.norm().item()
    assert not found[1][0, 3].any()


def test_states_of_zeros_have_a_finite_error():
    error_, gradient = losses.state_errors(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1))
    assert not error_.any()
    assert not gradient.any()


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that ran, in order, where CPU tensors are taken for those of a GPU."""
    ran = []
    monkeypatch.setattr(available, "runs_on", lambda device: True)
    for name in ("token_losses", "state_errors", "token_scores"):
        launch = getattr(losses, name)

        def counted(*args, launch=launch, name=name):
            ran.append(name)
            return launch(*args)

        monkeypatch.setattr(losses, name, counted)
    return ran


def training_losses(logits, teacher, ids, states, theirs):
    """All losses of training, by forwards whose hidden states are the logits, and their gradients."""
    leaf, leaves = logits.clone().requires_grad_(), [state.clone().requires_grad_() for state in states]
    student, other = (BelowHead(None, x, lambda hidden: hidden, 40) for x in (leaf, teacher))
    found = kd_loss(student, other), ce_loss(student, ids), hidden_loss(leaves, list(theirs))
    sum((k + 1) * loss for k, loss in enumerate(found)).backward()
    return *(loss.detach() for loss in found), leaf.grad, *(state.grad for state in leaves)


def test_training_computes_the_losses_of_a_cpu(request):
    logits, teacher = (x.view(2, 7, 40) for x in pair(14, 40, torch.float32, 1.0))
    states, theirs = [torch.randn(2, 7, 8) for _ in range(2)], [torch.randn(2, 7, 8) for _ in range(2)]
    arguments = (logits, teacher, torch.arange(14).view(2, 7), states, theirs)
    expected = training_losses(*arguments)
    ran = request.getfixturevalue("launched")
    for found, right in zip(training_losses(*arguments), expected, strict=True):
        torch.testing.assert_close(found, right)
    assert ran == ["token_losses"] * 2 + ["state_errors"] * 2
    token_scores(logits[0], torch.arange(7), teacher[0])
    assert ran[-1] == "token_scores"


def test_what_the_kernels_do_not_know_is_left_to_torch(launched):
    logits = torch.randn(3, 8, dtype=torch.float64)
    assert not seam.supports(logits)
    assert seam.on_gpu(torch.empty(0, 8)) is None
    assert chunk_losses(logits, torch.arange(3), 3, None).dtype == torch.float32
    assert launched == []


def test_a_place_that_does_not_fit_is_refused(launched):
    with pytest.raises(LlmqatError, match="the gradient must be"):
        seam.token_losses(torch.zeros(2, 8), torch.arange(2), 1.0, torch.zeros(2, 9))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_losses_of_a_device_stay_there(pretended, monkeypatch):
    monkeypatch.setattr(available, "runs_on", lambda device: device == PRETENDED)
    logits, teacher = (x.to(PRETENDED) for x in pair(2, 8, torch.float32, 1.0))
    assert seam.on_gpu(logits, teacher) is losses
    assert seam.on_gpu(logits, teacher.cpu()) is None
    assert seam.token_losses(logits, teacher, 1.0, logits).device == PRETENDED
    assert token_scores(logits, torch.tensor([0, 7]).to(PRETENDED), None).device == PRETENDED
    assert {x.device for x in seam.state_errors(logits, teacher, logits[:, 0])} == {PRETENDED}
