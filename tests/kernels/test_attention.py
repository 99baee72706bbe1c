"""Attention of training in tiles: as exact as torch's in bfloat16, whatever a query sees, and however tensors lie."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llmqat.errors import LlmqatError
from llmqat.kernels import attention, native
from llmqat.kernels.attention import Softmax, attend, fits, has_attention, seen_by_all, seen_by_mask

pytestmark = pytest.mark.skipif(not has_attention(), reason="attention of training needs tiles (AMX)")


def reference(q, k, v, mask, softcap):
    """Attention by its formula, ``(sequences, queries, heads, head_dim)``."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    weights = torch.softmax(scores.masked_fill(~mask, torch.finfo(q.dtype).min), -1) * mask
    return (weights @ v).transpose(1, 2)


def by_torch(q, k, v, mask, softcap):
    if softcap:
        return reference(q, k, v, mask, softcap)
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    return scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def in_tiles(q, k, v, mask, softcap):
    return attend(q, k, v, Softmax(seen_by_mask(mask), q.shape[-1] ** -0.5, softcap))


def causal(sequences, length, window=None, starts=None, ends=None):
    """Who sees whom: up to its own place, of the last `window`, between the start and the end of a sequence."""
    row, column = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (row >= column) & (row - column < (window or length))
    mask = mask.expand(sequences, 1, length, length).clone()
    for i, (start, end) in enumerate(zip(starts or [], ends or [], strict=True)):
        mask[i, ..., :start] = mask[i, ..., end:] = False
    return mask


def random_heads(shape, length, spread=1.0, seed=0):
    """Query, key and value as projections leave them, rows outside of heads."""
    sequences, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(sequences, length, count, dim) for count in (heads, kv_heads, kv_heads)]
    return [(torch.randn(size, generator=generator) * spread).bfloat16().transpose(1, 2) for size in sizes]


def results(function, inputs, *arguments, dtype=torch.bfloat16):
    """The output, and the gradients of a random linear function of it."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    out = function(*inputs, *arguments)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


def check(inputs, mask, softcap=0.0):
    """Errors are at most 1.5 times those of torch; and twice gives the same bits."""
    ours = results(in_tiles, inputs, mask, softcap)
    exact = results(reference, inputs, mask, softcap, dtype=torch.float64)
    for name, own, other, best in zip(
        ("out", "dq", "dk", "dv"), ours, results(by_torch, inputs, mask, softcap), exact, strict=True
    ):
        error, limit = (own.double() - best).norm(), (other.double() - best).norm()
        assert error <= 1.5 * limit + 1e-5, f"{name}: {error:.2e} beside {limit:.2e}"
    assert all(map(torch.equal, ours, results(in_tiles, inputs, mask, softcap)))


@pytest.mark.parametrize("length", [1, 17, 100, 300])
@pytest.mark.parametrize("shape", [(2, 6, 2, 64), (1, 3, 1, 80), (1, 2, 2, 16)], ids=str)
def test_lengths_and_groups(shape, length):
    check(random_heads(shape, length), causal(shape[0], length))


def test_large_heads():
    check(random_heads((1, 2, 1, 256), 70), causal(1, 70))


@pytest.mark.parametrize("window", [1, 40, 130])
def test_windows(window):
    check(random_heads((1, 4, 2, 64), 300), causal(1, 300, window))


@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_soft_caps(softcap):
    check(random_heads((1, 4, 2, 64), 100, spread=2.0), causal(1, 100), softcap)


def test_padding_at_either_end():
    """A query among the padding sees nothing, and gets zeros."""
    mask = causal(3, 100, starts=[0, 33, 99], ends=[100, 90, 100])
    inputs = random_heads((3, 4, 2, 64), 100)
    check(inputs, mask)
    out = in_tiles(*inputs, mask, 0.0)
    assert not out[1, :33].any()
    assert out[1, 33:].any(-1).all()


def test_nobody_sees_anything():
    nothing = torch.zeros(1, 1, 40, 40, dtype=torch.bool)
    assert not any(x.any() for x in results(in_tiles, random_heads((1, 4, 2, 64), 40), nothing, 0.0))


def test_not_finite():
    """A value that is no number reaches whoever sees it, and nobody else."""
    q, k, v = random_heads((1, 4, 2, 64), 40)
    k[0, 0, 20, 3] = torch.nan
    out = in_tiles(q, k, v, causal(1, 40), 0.0)
    assert out[0, 20:, :2].isnan().all()
    assert out[0, :20].isfinite().all()
    assert out[0, :, 2:].isfinite().all()


def test_packed_sequences():
    place = torch.tensor([0] * 30 + [1] * 50 + [2] * 20)
    check(random_heads((1, 2, 1, 64), 100), causal(1, 100) & (place[:, None] == place[None]))


def test_all_see_all():
    inputs, mask = random_heads((2, 4, 4, 64), 77), torch.ones(2, 1, 77, 77, dtype=torch.bool)
    check(inputs, mask)
    whole = attend(*inputs, Softmax(seen_by_all(77, 77, causal=False), 0.125))
    assert torch.equal(whole, in_tiles(*inputs, mask, 0.0))


def test_fewer_queries_than_keys():
    q, k, v = random_heads((1, 4, 2, 64), 100)
    check((q[:, :, 60:], k, v), causal(1, 100)[:, :, 60:])


def test_large_scores():
    check(random_heads((1, 2, 1, 64), 100, spread=8.0), causal(1, 100))


def test_any_strides():
    """Heads outside, one tensor for all three, columns outside, and a gradient that is expanded."""
    q, k, v = random_heads((2, 2, 2, 64), 50)
    softmax = Softmax(seen_by_all(50, 50, causal=True), 0.125)
    expected = attend(q, k, v, softmax)
    together = torch.cat([q, k, v], -1)
    turned = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    for inputs in (x.contiguous() for x in (q, k, v)), together.chunk(3, -1), turned:
        assert torch.equal(attend(*inputs, softmax), expected)
    q.requires_grad_()
    sums = torch.autograd.grad(attend(q, k, v, softmax).float().sum(), q)[0]
    expanded = torch.autograd.grad(
        attend(q, k, v, softmax), q, torch.ones(1, dtype=torch.bfloat16).expand(2, 50, 2, 64)
    )[0]
    assert torch.equal(sums, expanded)


def test_threads_change_nothing():
    inputs, mask, threads = random_heads((1, 4, 2, 64), 300), causal(1, 300), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results(in_tiles, inputs, mask, 0.0)
        torch.set_num_threads(3)
        assert all(map(torch.equal, one, results(in_tiles, inputs, mask, 0.0)))
    finally:
        torch.set_num_threads(threads)


def test_masks_as_runs():
    mask = causal(2, 20, window=5, starts=[0, 3], ends=[20, 15])
    seen = seen_by_mask(mask)
    column = torch.arange(20)
    assert torch.equal((column >= seen[..., :1]) & (column < seen[..., 1:]), mask[:, 0])
    assert torch.equal(seen_by_mask(causal(1, 20)), seen_by_all(20, 20, causal=True))
    mask[1, 0, 12, 9] = False
    assert seen_by_mask(mask) is None


def test_shapes_that_are_left_to_torch():
    q, k, v = random_heads((1, 4, 2, 64), 20)
    assert fits(q, k, v)
    assert not fits(q, k, v[..., :32])  # values of their own width
    assert not fits(*(x[..., :56] for x in (q, k, v)))
    assert not fits(q[:, :3], k, v)
    assert not fits(q[:, :, :5], k, v)  # no work for tiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 24}, "head_dim is 24, the kernels take multiples of 16"),
        ({"head_dim": 512}, "head_dim is 512, the kernels take 16 to 256"),
        ({"heads": 3}, "2 kv_heads do not divide 3 heads"),
        ({"scale": 0.0}, "scale is 0 and softcap 0: one has to be > 0, the other >= 0"),
        ({"keys": 19}, "end of the keys of a query is 20, the kernels take 0 to 19"),
        ({"seen": None}, "seen has no memory"),
    ],
    ids=str,
)
def test_what_is_refused(change, message):
    q, k, v = random_heads((1, 4, 2, 64), 20)
    call = attention._attention(q, k, v, q.clone(), None, Softmax(seen_by_all(20, 20, causal=True), 1.0))
    for name, value in change.items():
        setattr(call, name, value)
    with pytest.raises(LlmqatError, match=message):
        attention.call("llmqat_attend", attention.ctypes.byref(call))


def test_no_tiles_no_attention():
    inputs, kernels = random_heads((1, 4, 2, 64), 20), native.library()
    kernels.llmqat_use_isa(native.ISAS.index("portable"))
    try:
        assert not kernels.llmqat_has_attention()
        with pytest.raises(LlmqatError, match="no tiles for attention"):
            in_tiles(*inputs, causal(1, 20), 0.0)
    finally:
        kernels.llmqat_use_isa(kernels.llmqat_best_isa())
