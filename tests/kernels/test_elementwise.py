"""Norms, gates and rotary embedding of training against float64, on every instruction set of this machine."""

import ctypes
from functools import partial

import pytest
import torch
from torch.nn.functional import gelu, silu
from transformers.models.phi3.modeling_phi3 import apply_rotary_pos_emb

from llmqat.errors import LlmqatError
from llmqat.kernels import gates, native, norms, rotary, training
from llmqat.kernels.norms import Convention

FLOAT, BFLOAT = torch.float32, torch.bfloat16
CONVENTIONS = {"llama": Convention(1e-5), "gemma": Convention(1e-6, 1.0, True), "olmo2": Convention(1e-6, 0.0, True)}
ACTIVATIONS = {"silu": silu, "gelu_tanh": partial(gelu, approximate="tanh")}
# float32 results are as fine as torch's, but of so few roundings that chance decides who is nearer.
FINE = 1e-6

pytestmark = pytest.mark.skipif(training.library() is None, reason="needs the compiled kernels")


@pytest.fixture(params=native.available(), autouse=True)
def isa(request):
    """One instruction set of this machine, in use."""
    kernels = training.library()
    kernels.llmqat_use_isa(native.ISAS.index(request.param))
    yield request.param
    kernels.llmqat_use_isa(kernels.llmqat_best_isa())


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def check(ours, theirs, inputs):
    """Compare result and gradients of two functions of `inputs` with those of `theirs` in float64.

    Gradients of the result are those of a random tensor of its dtype.
    """
    results = []
    for function, cast in ((ours, torch.Tensor.detach), (theirs, torch.Tensor.detach), (theirs, torch.Tensor.double)):
        leaves = [cast(x.detach()).requires_grad_() for x in inputs]
        y = function(*leaves)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(
            results[0][0].dtype if results else y.dtype
        )
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g.to(y.dtype))])
    for mine, torchs, exact in zip(*results, strict=True):
        assert (mine.dtype, mine.shape) == (torchs.dtype, torchs.shape)
        assert error(mine, exact) <= 1.5 * error(torchs, exact) + FINE
    mine, torchs = results[0][0], results[1][0]
    if mine.dtype != FLOAT:
        assert (mine != torchs).double().mean() < 0.01, "roundings are not those of torch"


def plain_norm(x, weight, convention):
    """The modules of transformers; in float64 without a rounding."""
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + convention.eps)
    if convention.rounds_once:
        return (normed * (convention.offset + weight.to(wide.dtype))).type_as(x)
    return weight * normed.to(x.dtype)


@pytest.mark.parametrize("convention", CONVENTIONS.values(), ids=CONVENTIONS)
@pytest.mark.parametrize("dtypes", [(BFLOAT, BFLOAT), (BFLOAT, FLOAT), (FLOAT, BFLOAT), (FLOAT, FLOAT)], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (300, 97)], ids=str)
def test_norms(convention, dtypes, shape):
    x, weight = torch.randn(shape).to(dtypes[0]), torch.randn(shape[-1]).to(dtypes[1])
    x[0] *= 1e-3
    check(partial(norms.rms_norm, convention=convention), partial(plain_norm, convention=convention), (x, weight))


def test_norms_of_values_that_lie_apart():
    convention, weight = CONVENTIONS["gemma"], torch.randn(16).bfloat16()
    whole = torch.randn(2, 11, 3, 32).bfloat16()
    for x in (whole[..., :16].transpose(1, 2), whole[:, :, ::2, 16:], whole.reshape(2, 11, 6, 16).transpose(1, 2)):
        check(partial(norms.rms_norm, convention=convention), partial(plain_norm, convention=convention), (x, weight))
        leaf = x.detach().requires_grad_()
        y = norms.rms_norm(leaf, weight, convention)
        assert torch.equal(y, norms.rms_norm(x.contiguous(), weight, convention))
        g = torch.randn_like(y)
        (dx,) = torch.autograd.grad(y, leaf, g.transpose(0, 1).contiguous().transpose(0, 1), retain_graph=True)
        assert torch.equal(dx, torch.autograd.grad(y, leaf, g)[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [BFLOAT, FLOAT], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (2, 5, 64), (90, 531)], ids=str)
def test_gates(activation, dtype, shape):
    gate, up = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)

    def plain(gate, up):
        return ACTIVATIONS[activation](gate) * up

    check(partial(gates.gated, activation=activation), plain, (gate, up))
    check(
        partial(gates.gated_halves, activation=activation),
        lambda both: plain(*both.chunk(2, -1)),
        (torch.cat([gate, up], -1),),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_from_zero(activation):
    x = torch.tensor([-torch.inf, -200.0, -90.0, -1e-30, 0.0, 1e-30, 90.0, 1e30, torch.inf, torch.nan])
    gate, up = x.clone().requires_grad_(), torch.ones_like(x)
    y = gates.gated(gate, up, activation)
    (slope,) = torch.autograd.grad(y, gate, torch.ones_like(x))
    assert torch.allclose(y[1:-1], x[1:-1].clamp(min=0), atol=1e-20)
    assert torch.allclose(slope[[1, 2, 4, 6]], torch.tensor([0.0, 0.0, 0.5, 1.0]), atol=1e-20)
    assert y[-1].isnan()
    assert slope[-1].isnan()


@pytest.mark.parametrize("dtypes", [(BFLOAT, BFLOAT), (BFLOAT, FLOAT), (FLOAT, BFLOAT), (FLOAT, FLOAT)], ids=str)
@pytest.mark.parametrize(("dim", "features"), [(64, 64), (6, 6), (80, 32)])
def test_rotary(dtypes, dim, features):
    whole = torch.randn(2, 17, 3, dim + 2).to(dtypes[0])
    for x in (whole[..., :dim].transpose(1, 2), whole.transpose(1, 2)[..., 1:-1], whole.transpose(1, 3)[:, :dim].mT):
        for batch in (1, 2):
            tables = [
                torch.randn(x.shape[0] if batch == 2 else 1, x.shape[2], features).to(dtypes[1]) for _ in range(2)
            ]

            def plain(x, tables=tables):
                wide = [table.to(torch.promote_types(table.dtype, x.dtype)) for table in tables]
                return apply_rotary_pos_emb(x, x, *(wide if x.dtype == torch.float64 else tables))[0]

            if x.shape[-1] == dim:
                check(lambda x, tables=tables: rotary.rotate(x, *tables), plain, (x,))
                ours, theirs = rotary.rotate(x, *tables), plain(x)
                assert torch.equal(ours, theirs) if ours.dtype == BFLOAT else torch.allclose(ours, theirs, atol=1e-6)


def test_tables_that_train_are_not_taken():
    x, table = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    assert rotary.takes(x, table, table)
    assert not rotary.takes(x, table, table.clone().requires_grad_())
    assert not rotary.takes(x, table[:, :2], table[:, :2])
    assert not rotary.takes(x[0], table, table)


def results():
    """Everything that several threads compute, of sizes that make several tasks."""
    generator = torch.Generator().manual_seed(0)

    def leaf(*shape):
        return torch.randn(shape, generator=generator).bfloat16().requires_grad_()

    x, weight, gate, up, q = leaf(5000, 40), leaf(40), leaf(700, 50), leaf(700, 50), leaf(3, 5, 300, 16)
    tables = [torch.randn(1, 300, 16, generator=generator) for _ in range(2)]
    ys = norms.rms_norm(x, weight, Convention(1e-6)), gates.gated(gate, up, "silu"), rotary.rotate(q, *tables)
    gradients = torch.autograd.grad(ys, (x, weight, gate, up, q), [torch.ones_like(y) + y.detach() for y in ys])
    return *ys, *gradients


def test_results_repeat_with_any_number_of_threads():
    threads, first = torch.get_num_threads(), results()
    try:
        for count in (1, 3, 16):
            torch.set_num_threads(count)
            assert all(map(torch.equal, results(), first))
    finally:
        torch.set_num_threads(threads)


def test_no_rows():
    x, weight = torch.empty(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    y = norms.rms_norm(x, weight, Convention(1e-6))
    dx, dweight = torch.autograd.grad(y, (x, weight), torch.empty(0, 8))
    assert dx.shape == (0, 8)
    assert not dweight.any()
    assert gates.gated(x, x, "silu").shape == (0, 8)


def test_what_is_not_read_is_not_taken():
    x = torch.ones(2, 8)
    assert norms.takes(x, x[0])
    assert gates.takes(x, x)
    for other in (x.double(), x.to("meta"), x.to_sparse()):
        assert not norms.takes(other, x[0])
        assert not gates.takes(other, other)
    assert not norms.takes(x, x[0, :4])
    assert not gates.takes(x, x.bfloat16())


REFUSED = [
    ("llmqat_norm_forward", norms.RmsNorm(rows=1, count=0), "values of a row is 0"),
    ("llmqat_norm_backward", norms.RmsNorm(rows=1, count=8), "weight has no memory"),
    ("llmqat_norm_forward", norms.RmsNorm(rows=1, count=8, y_dtype=7), "y has dtype number 7"),
    ("llmqat_gate_forward", gates.Gate(rows=1, count=8, stride=4), "stride of rows is 4"),
    ("llmqat_gate_backward", gates.Gate(rows=1, count=8, stride=8, activation=2), "there is no activation 2"),
    ("llmqat_rotate", rotary.Rotation(heads=1, length=1, dim=513), "dim of a head is 513"),
    ("llmqat_rotate", rotary.Rotation(heads=1, length=1, dim=8, rotary=3), "rotary table is 3, it must be even"),
    ("llmqat_rotate", rotary.Rotation(batch=1, heads=1, length=1, dim=8, rotary=8), "x has no memory"),
]


@pytest.mark.parametrize(("function", "struct", "message"), REFUSED)
def test_what_is_wrong_is_said(function, struct, message):
    with pytest.raises(LlmqatError, match=message):
        training.call(function, ctypes.byref(struct))
