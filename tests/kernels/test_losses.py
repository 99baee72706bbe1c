"""Losses of tokens and errors of states by every instruction set, beside torch's in float32, against float64."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import losses, native, training
from llmqat.train.losses import state_errors, token_losses

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def here(isa, monkeypatch):
    """The instruction set in use for training too."""
    monkeypatch.setattr(training, "library", native.library)


def pair(rows, width, dtype, apart):
    """Logits or states, and others that differ from them by `apart` and by a constant of each row."""
    generator = torch.Generator().manual_seed(rows + width)
    target = 3 * torch.randn(rows, width, generator=generator)
    other = target + apart * torch.randn(rows, width, generator=generator) + torch.randn(rows, 1, generator=generator)
    return other.to(dtype), target.to(dtype)


def exact(logits, targets):
    """Losses of tokens and their gradients in float64."""
    leaf = logits.double().requires_grad_()
    log_q = torch.log_softmax(leaf, -1)
    if targets.ndim == 2:
        log_p = torch.log_softmax(targets.double(), -1)
        loss = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        loss = -log_q.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def error(found, expected):
    return (found.double() - expected).norm().item()


# Parts of a row are 1,024 numbers, lanes 32: one number, whole lanes and a tail, several parts and a tail.
@pytest.mark.parametrize("width", [1, 37, 3113])
@pytest.mark.parametrize("apart", [4.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("of", ["teacher", "ids"])
def test_losses_of_tokens_are_as_exact_as_those_of_torch(of, dtype, apart, width):
    logits, teacher = pair(19, width, dtype, apart)
    targets = teacher if of == "teacher" else torch.arange(19) * 7 % width
    loss, gradient = exact(logits, targets)
    by_torch = token_losses(logits, targets)
    own = torch.full_like(logits, torch.nan)
    found = losses.token_losses(logits, targets, 0.25, own)
    # One rounding is allowed where torch has none.
    assert error(found, loss) <= 1.5 * error(by_torch[0], loss) + 2e-7 * loss.norm().item()
    rounded = (by_torch[1] / 4).to(dtype)
    assert error(own, gradient / 4) <= 1.5 * error(rounded, gradient / 4) + 2e-8 * gradient.norm().item()
    assert torch.equal(losses.token_losses(logits, targets, 1.0, None), found), "without a gradient"
    losses.token_losses(logits, targets, 0.25, logits)
    assert torch.equal(logits, own), "in place of the logits"


@pytest.mark.parametrize("apart", [1e-2, 1e-4])
def test_divergence_near_zero_does_not_cancel(apart):
    logits, teacher = pair(8, 2000, torch.float32, apart)
    loss, gradient = exact(logits, teacher)
    own = torch.empty_like(logits)
    found = losses.token_losses(logits, teacher, 1.0, own)
    assert error(found, loss) < 1e-5 * loss.norm()
    assert error(token_losses(logits, teacher)[0], loss) > 1e-4 * loss.norm(), "in float32 the usual sum does"
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


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_values_that_are_not_finite_spoil_their_token_only(value):
    logits, teacher = pair(3, 2000, torch.float32, 1.0)
    logits[1, 1999] = value
    own = torch.empty_like(logits)
    for targets in (teacher, torch.arange(3)):
        found = losses.token_losses(logits, targets, 1.0, own)
        assert found.isfinite().tolist() == own.isfinite().all(-1).tolist() == [True, False, True]


def test_words_ruled_out_have_no_probability():
    """Cross-entropy of logits of which some are minus infinity, a whole part of a row among them."""
    logits = pair(2, 2100, torch.float32, 1.0)[0]
    logits[:, :1030] = -torch.inf
    own = torch.empty_like(logits)
    found = losses.token_losses(logits, torch.tensor([1500, 2099]), 1.0, own)
    loss, gradient = exact(logits, torch.tensor([1500, 2099]))
    torch.testing.assert_close(found, loss.float())
    torch.testing.assert_close(own, gradient.float())


def test_result_repeats_with_any_number_of_threads():
    (logits, teacher), threads = pair(33, 700, torch.bfloat16, 1.0), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            own = torch.empty_like(logits)
            results.append((losses.token_losses(logits, teacher, 1.0, own), own))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("id_", [-100, 8])
def test_ids_beyond_the_vocabulary_are_refused(id_):
    with pytest.raises(LlmqatError, match="an id"):
        losses.token_losses(torch.zeros(2, 8), torch.tensor([0, id_]), 1.0, None)


@pytest.mark.parametrize("target_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 45, 576])
def test_errors_of_states_are_as_exact_as_those_of_torch(width, dtype, target_dtype):
    states, targets = pair(14, width, dtype, 0.1)
    states, targets, factors = states.view(2, 7, width), targets.to(target_dtype).view(2, 7, width), torch.rand(2, 7)
    factors[0, 3] = 0
    leaf = states.double().requires_grad_()
    each = (leaf - targets.double()).square().sum(-1) / targets.double().square().sum(-1)
    gradient = torch.autograd.grad((each * factors).sum(), leaf)[0]
    by_torch, found = state_errors(states, targets, factors), losses.state_errors(states, targets, factors)
    assert found[0].dtype == torch.float32
    assert found[1].dtype == dtype
    assert error(found[0], each.detach()) <= 1.5 * error(by_torch[0], each.detach()) + 2e-7 * each.norm().item()
    assert error(found[1], gradient) <= 1.5 * error(by_torch[1], gradient) + 1e-7 * gradient.norm().item()
    assert not found[1][0, 3].any()


def test_states_of_zeros_have_a_finite_error():
    error_, gradient = losses.state_errors(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1))
    assert not error_.any()
    assert not gradient.any()
