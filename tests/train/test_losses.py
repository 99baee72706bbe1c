import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from llmqat.data.chat import places
from llmqat.errors import LlmqatError
from llmqat.kernels import training
from llmqat.models import output_head
from llmqat.models.output_head import BelowHead
from llmqat.train import losses
from llmqat.train.losses import chunk_losses, hidden_loss, token_losses

V = 11


def from_logits(logits):
    """A forward whose hidden states are the logits."""
    return BelowHead(None, logits, lambda hidden: hidden, V)


def kd_loss(logits, teacher, counts=None):
    return losses.kd_loss(from_logits(logits), from_logits(teacher), places(counts))


def ce_loss(logits, ids, counts=None):
    return losses.ce_loss(from_logits(logits), ids, places(counts))


def torch_kd(logits, teacher):
    log_q, log_p = log_softmax(logits, -1).flatten(0, 1), log_softmax(teacher, -1).flatten(0, 1)
    return kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def torch_ce(logits, ids):
    return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


@pytest.fixture(params=["kd", "ce"])
def loss(request):
    """Ours, torch's, and targets ``(batch, length, ...)`` for them."""
    if request.param == "kd":
        return kd_loss, torch_kd, lambda *shape: 2 * torch.randn(*shape, V)
    return ce_loss, torch_ce, lambda *shape: torch.randint(V, shape)


# Chunks of 8 tokens: fewer, one chunk exactly, a chunk and a token, several with a rest.
@pytest.mark.parametrize("shape", [(1, 5), (2, 4), (1, 9), (3, 9), (2, 20)], ids=str)
def test_equals_torch_in_value_and_gradient(monkeypatch, loss, shape):
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 8 * V)
    ours, theirs, targets = loss
    target = targets(*shape)
    logits = (3 * torch.randn(*shape, V)).requires_grad_()
    twin = logits.detach().double().requires_grad_()
    value, expected = ours(logits, target), theirs(twin, target.double() if target.is_floating_point() else target)
    (3 * value).backward()
    (3 * expected).backward()
    torch.testing.assert_close(value.double(), expected.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), twin.grad, rtol=1e-5, atol=1e-7)


def test_many_tokens_cross_the_real_chunks(loss):
    ours, theirs, targets = loss
    shape = (2, output_head.CHUNK_LOGITS // V // 2 + 3)
    logits, target = torch.randn(*shape, V), targets(*shape)
    torch.testing.assert_close(ours(logits, target), theirs(logits, target), rtol=1e-5, atol=1e-6)


def test_bfloat16_logits_are_summed_in_float32(loss):
    ours, theirs, targets = loss
    logits, target = torch.randn(2, 300, V).bfloat16().requires_grad_(), targets(2, 300)
    value = ours(logits, target)
    value.backward()
    assert value.dtype == torch.float32
    assert logits.grad.dtype == torch.bfloat16
    torch.testing.assert_close(value, theirs(logits.detach().float(), target), rtol=1e-5, atol=1e-6)


def test_kd_is_zero_at_equality():
    logits = torch.randn(2, 7, V, requires_grad=True)
    loss = kd_loss(logits, logits.detach().clone())
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()


def test_kd_takes_logits_up_to_a_constant_per_token():
    logits, teacher = torch.randn(2, 7, V), torch.randn(2, 7, V)
    torch.testing.assert_close(kd_loss(logits + torch.randn(2, 7, 1), teacher), kd_loss(logits, teacher))
    assert kd_loss(logits, teacher) > 0
    assert not torch.isclose(kd_loss(logits, teacher), kd_loss(teacher, logits))  # forward KL, teacher first


def test_token_mean_does_not_depend_on_the_batch(loss):
    ours, _, targets = loss
    logits, target = torch.randn(6, 7, V), targets(6, 7)
    parts = [ours(logits[i : i + 2], target[i : i + 2]) for i in range(0, 6, 2)]
    torch.testing.assert_close(ours(logits, target), torch.stack(parts).mean())


def test_hidden_loss_is_the_relative_error_of_each_token_and_block():
    teacher = [torch.randn(2, 5, 8) for _ in range(3)]
    assert hidden_loss(teacher, list(teacher)) == 0
    off = [state * (1 + 0.1 * (block + 1)) for block, state in enumerate(teacher)]
    torch.testing.assert_close(hidden_loss(off, list(teacher)), torch.tensor((0.01 + 0.04 + 0.09) / 3))
    scaled = hidden_loss([100 * state for state in off], [100 * state for state in teacher])
    torch.testing.assert_close(scaled, hidden_loss(off, list(teacher)))  # no block counts more for being larger


@pytest.mark.parametrize("states", [[torch.ones(1, 2, 8)], [torch.ones(1, 2, 4), torch.ones(1, 2, 4)]])
def test_hidden_loss_needs_a_teacher_of_the_same_shape(states):
    with pytest.raises(LlmqatError, match="differ in depth or width; set hidden_weight to 0"):
        hidden_loss(states, [torch.ones(1, 2, 8), torch.ones(1, 2, 8)])


@pytest.mark.parametrize("shape", [(1, 5), (3, 9), (2, 20)], ids=str)
def test_only_positions_that_count_have_loss_and_gradient(monkeypatch, loss, shape):
    """Equal to the loss over a batch of those positions alone; the others may hold anything."""
    monkeypatch.setattr(output_head, "CHUNK_LOGITS", 8 * V)
    ours, _, targets = loss
    logits, target = (3 * torch.randn(*shape, V)).requires_grad_(), targets(*shape)
    counts = torch.rand(shape) < 0.4
    counts[0, 0], counts[:, -1] = True, False
    value = ours(logits, target, counts)
    value.backward()
    log_q = log_softmax(logits.detach(), -1)
    if target.is_floating_point():
        log_p = log_softmax(target, -1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
    else:
        each = -log_q.gather(-1, target.roll(-1, 1).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(value, each[counts].mean())
    assert (logits.grad != 0).any(-1).equal(counts)
    spoiled = torch.where(counts[..., None], logits.detach(), 99 * torch.randn(*shape, V))
    assert torch.equal(ours(spoiled, target, counts), value)


def test_hidden_loss_of_the_positions_that_count():
    states, teacher = [torch.randn(2, 5, 8)], [torch.randn(2, 5, 8)]
    counts = torch.zeros(2, 5, dtype=torch.bool)
    counts[0, 1:3] = True
    expected = hidden_loss([states[0][:1, 1:3]], [teacher[0][:1, 1:3]])
    torch.testing.assert_close(hidden_loss(states, list(teacher), places(counts)), expected)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
def test_gradient_of_the_hidden_loss_is_that_of_its_formula(some):
    states = [torch.randn(2, 5, 8, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(2, 5, 8) for _ in range(3)]
    counts = torch.rand(2, 5) < 0.5 if some else None
    errors = [(h - t).square().sum(-1) / t.square().sum(-1) for h, t in zip(states, teacher, strict=True)]
    formula = torch.stack([(e if counts is None else e[counts]).mean() for e in errors]).mean()
    expected = torch.autograd.grad(3 * formula, states)
    given = list(teacher)
    loss = hidden_loss(states, given, places(counts))
    assert given == [], "nothing holds the teacher's states any more"
    found = torch.autograd.grad(3 * loss, states)
    torch.testing.assert_close(loss, formula)
    torch.testing.assert_close(found, expected)


def test_gradients_are_given_once(loss):
    ours, _, targets = loss
    value = ours(torch.randn(2, 5, V, requires_grad=True), targets(2, 5))
    value.backward(retain_graph=True)
    with pytest.raises(LlmqatError, match="backward once for each forward"):
        value.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("targets", ["teacher", "ids"])
def test_few_tokens_at_a_time_give_the_same_bits(monkeypatch, dtype, targets):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(7, 1000, generator=generator).to(dtype) for _ in range(2))
    aimed = teacher if targets == "teacher" else torch.arange(7)
    loss, delta = token_losses(logits, aimed)
    monkeypatch.setattr(output_head, "CACHED_LOGITS", 2500)
    monkeypatch.setattr(training, "library", lambda: None)
    assert torch.equal(chunk_losses(logits, aimed, 13, logits), loss)
    assert torch.equal(logits, delta.div_(13).to(dtype)), "in place"
