from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from llmqat.nn import fake_quant_operator
from llmqat.nn.fake_quant_function import fake_quant_linear
from llmqat.quant import grid
from llmqat.quant.affine import choose_scale, dequantize, fake_quantize_activation, grouped, quantize, ranges_of
from llmqat.quant.fake_quant import fake_quantize
from llmqat.quant.grid import Adapters, Grid, Latent
from llmqat.scheme import QuantScheme
from tests.quant.helpers import random_change

STORAGE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("storage_dtype", STORAGE_DTYPES, ids=str)
@pytest.mark.parametrize(
    ("columns", "group_size"), [(96, 1), (96, 16), (96, 32), (96, -1), (83, -1), (83, 1), (85, 17)]
)
def test_is_dequantize_of_quantize_bit_for_bit(bits, symmetric, columns, group_size, storage_dtype, monkeypatch):
    scheme = QuantScheme(bits, group_size, symmetric)
    for seed in range(6):
        torch.manual_seed(seed)
        weight = torch.randn(13, columns)
        scale, zero_point = choose_scale(weight, scheme, torch.float32)
        scale = scale * (1 + 0.1 * torch.randn_like(scale))  # as after some training: not a value of the storage dtype
        stored = scale.to(storage_dtype)
        z = None if zero_point is None else zero_point + 0.3
        expected = dequantize(quantize(weight, stored, zero_point, scheme), stored, zero_point, scheme)
        w_hat = fake_quantize(Latent(weight), Grid(scale, z, None, scheme, storage_dtype))
        assert w_hat.dtype == storage_dtype
        assert torch.equal(w_hat, expected)
        assert torch.equal(fake_quantize(Latent(weight), Grid(scale, z, None, scheme, storage_dtype)), w_hat)
        with monkeypatch.context() as patch:
            patch.setattr(grid, "CHUNK_ELEMENTS", 4 * columns)
            assert torch.equal(fake_quantize(Latent(weight), Grid(scale, z, None, scheme, storage_dtype)), w_hat)


class Straight(torch.autograd.Function):
    """`y` forward, the gradient of `x` backward."""

    @staticmethod
    def forward(ctx, x, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def straight(x, fn):
    return Straight.apply(x, fn(x.detach()))


def by_value(
    x, weight, scale, zero_point, bias, scheme, storage_dtype, *, clip_mask, lora_scaling,
    code_scale=None, compensation=None, lora_a=None, lora_b=None,
):  # fmt: skip
    adapters = None if lora_a is None else Adapters(lora_a, lora_b, lora_scaling)
    grid = Grid(scale, zero_point, code_scale, scheme, storage_dtype)
    return fake_quant_linear(x, Latent(weight, compensation, adapters), grid, bias, clip_mask=clip_mask)


@dataclass
class Case:
    """Arguments of `fake_quant_linear`, and an independent forward that plain autograd differentiates."""

    scheme: QuantScheme
    storage_dtype: torch.dtype
    tensors: dict[str, Tensor]
    options: dict[str, Tensor | float | bool]

    @classmethod
    def make(
        cls, scheme, storage_dtype=torch.float32, code_scale=False, compensation=False, lora=False, clip_mask=False
    ):
        weight = torch.randn(12, 32)
        # ranges shrunk to 0.6 of what the weights need: a good part of them lies beyond the grid
        scale, z = ranges_of(weight, scheme).scale(scheme, torch.float32, shrink=0.6)
        tensors = {"x": torch.randn(2, 5, 32), "weight": weight, "scale": scale * 1.013, "bias": torch.randn(12)}
        if z is not None:
            tensors["zero_point"] = z + 0.2 * torch.rand_like(z)
        if lora:
            tensors |= {"lora_a": torch.randn(3, 32) * 0.3, "lora_b": torch.randn(12, 3) * 0.3}
        options = {"clip_mask": clip_mask, "lora_scaling": 0.7 if lora else 1.0}
        if code_scale:
            options["code_scale"] = scale * 0.98
        if compensation:
            options["compensation"] = random_change(12, 32, scheme.group_length(32), 0.2)
        return cls(scheme, storage_dtype, tensors, options)

    def to(self, dtype):
        tensors = {name: torch.nn.Parameter(t.detach().to(dtype)) for name, t in self.tensors.items()}
        options = {name: v.to(dtype) if torch.is_tensor(v) else v for name, v in self.options.items()}
        return replace(self, tensors=tensors, options=options)

    def run(self, fn=by_value):
        t = {"zero_point": None, **self.tensors}
        args = [t.pop(name) for name in ("x", "weight", "scale", "zero_point", "bias")]
        return fn(*args, self.scheme, self.storage_dtype, **t, **self.options)

    def gradients(self, fn=by_value):
        torch.manual_seed(7)
        y = self.run(fn)
        grads = torch.autograd.grad(y, list(self.tensors.values()), torch.randn(2, 5, 12).to(y.dtype))
        return {"y": y.detach(), **dict(zip(self.tensors, grads, strict=True))}


def reference(
    x, weight, scale, zero_point, bias, scheme, storage_dtype, *, clip_mask, lora_scaling,
    code_scale=None, compensation=None, lora_a=None, lora_b=None,
):  # fmt: skip
    latent = weight if compensation is None else weight + compensation.values(weight.dtype)
    if lora_a is not None:
        latent = latent + lora_scaling * (lora_b @ lora_a)
    stored = straight(scale, lambda s: s.to(storage_dtype).to(s.dtype)).unsqueeze(-1)
    s0 = stored if code_scale is None else code_scale.unsqueeze(-1)
    z = 0.0
    if zero_point is not None:
        z = straight(zero_point, lambda z: z.round().clamp(scheme.qmin, scheme.qmax)).unsqueeze(-1)
    u = straight(grouped(latent, scheme) / s0, torch.round) + z
    q = u.clamp(scheme.qmin, scheme.qmax) if clip_mask else straight(u, lambda u: u.clamp(scheme.qmin, scheme.qmax))
    w_hat = straight((stored * (q - z)).flatten(-2), lambda w: w.to(storage_dtype).to(w.dtype))
    return linear(x if scheme.act_bits is None else straight(x, fake_quantize_activation), w_hat, bias)


def error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30)).item()


EXTRAS = [{}, {"compensation": True}, {"lora": True}, {"compensation": True, "lora": True}]


@pytest.mark.parametrize("extra", EXTRAS, ids=lambda e: "+".join(e) or "plain")
@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("code_scale", [False, True], ids=["lsq", "apart"])
@pytest.mark.parametrize("clip_mask", [False, True], ids=["ste", "mask"])
def test_gradients_equal_autograd_in_float64(symmetric, clip_mask, code_scale, act_bits, extra):
    for bits, storage_dtype in product((2, 4, 8), (torch.float32, torch.bfloat16)):
        scheme = QuantScheme(bits, 8, symmetric, act_bits)
        case = Case.make(scheme, storage_dtype, code_scale, clip_mask=clip_mask, **extra).to(torch.float64)
        expected = case.gradients(reference)
        for name, value in case.gradients().items():
            assert error(value, expected[name]) < 1e-10, name
        assert symmetric or clip_mask == bool(expected["zero_point"].abs().max() > 0)


def test_clip_mask_stops_some_gradients_and_not_all(symmetric):
    scheme = QuantScheme(4, 8, symmetric)
    grads = {mask: Case.make(scheme, clip_mask=mask).to(torch.float64).gradients()["weight"] for mask in (False, True)}
    stopped = (grads[True] == 0).float().mean()
    assert 0.02 < stopped < 0.5
    assert (grads[False] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_as_close_to_float64_as_plain_torch(symmetric, dtype):
    """Only `x` is in `dtype`; masters stay float32. The baseline is the same formula as plain torch ops."""
    case = Case.make(QuantScheme(4, 8, symmetric), torch.bfloat16, compensation=True, lora=True, clip_mask=True)
    exact = case.to(torch.float64).gradients(reference)
    single = case.to(torch.float32)
    single.tensors["x"] = case.tensors["x"].to(dtype).requires_grad_()

    def cast_to_x(x, weight, scale, zero_point, bias, scheme, storage_dtype, **kwargs):
        def at_end(x_, w_hat_t):
            return x_ @ w_hat_t.to(x.dtype) + bias.to(x.dtype)

        eye = torch.eye(weight.shape[1])  # the reference's W_hat.T, by its own formula
        return at_end(x, reference(eye, weight, scale, zero_point, torch.zeros(12), scheme, storage_dtype, **kwargs))

    baseline, ours = single.gradients(cast_to_x), single.gradients()
    for name, value in ours.items():
        assert value.dtype == baseline[name].dtype, name
        assert error(value, exact[name]) <= 2 * error(baseline[name], exact[name]) + 1e-7, name


@pytest.mark.parametrize(
    "frozen", [("weight", "scale", "zero_point"), ("weight", "lora_a"), ("x", "bias"), ("scale",)], ids=str
)
@pytest.mark.parametrize("options", [{}, {"code_scale": True}, {"clip_mask": True}], ids=str)
def test_frozen_inputs_change_no_other_gradient(symmetric, frozen, options):
    """Above all: adapters alone take their gradient from thin factors, and get the one of the full formula."""
    case = Case.make(QuantScheme(4, 8, symmetric), lora=True, **options).to(torch.float64)
    expected = case.gradients()
    for name in set(frozen) & set(case.tensors):
        case.tensors[name].requires_grad_(False)
    some = {name: t for name, t in case.tensors.items() if t.requires_grad}
    torch.manual_seed(7)
    grads = torch.autograd.grad(case.run(), list(some.values()), torch.randn(2, 5, 12).double())
    for name, grad in zip(some, grads, strict=True):
        torch.testing.assert_close(grad, expected[name], rtol=1e-12, atol=1e-12)


def test_chunks_change_no_gradient(symmetric, monkeypatch):
    case = Case.make(QuantScheme(4, 8, symmetric), code_scale=True, compensation=True, lora=True, clip_mask=True)
    case = case.to(torch.float64)
    whole = case.gradients()
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 5 * 32)
    for name, value in case.gradients().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("x_shape", [(32,), (0, 32), (2, 0, 32), (1, 2, 3, 32)], ids=str)
def test_any_leading_shape(x_shape):
    case = Case.make(QuantScheme(4, 8, False, 8)).to(torch.float32)
    case.tensors["x"] = torch.randn(x_shape, requires_grad=True)
    y = case.run()
    assert y.shape == (*x_shape[:-1], 12)
    y.sum().backward()
    assert all(t.grad.shape == t.shape for t in case.tensors.values())


@pytest.mark.parametrize(
    ("lora", "storage_dtype"), [(False, torch.bfloat16), (True, torch.bfloat16), (True, torch.float32)]
)
def test_torch_compile_trains_on_the_same_grid(lora, storage_dtype):
    """In one piece, bit for bit: a fused kernel that skips the rounding of the scale would train on other codes."""
    torch._dynamo.reset()
    scheme = QuantScheme(4, 16, symmetric=not lora, act_bits=8 if lora else None)
    case = Case.make(scheme, storage_dtype, lora=lora, clip_mask=lora).to(torch.float32)
    eager, compiled = case.gradients(), case.gradients(torch.compile(by_value, fullgraph=True))
    for name, value in compiled.items():
        assert torch.equal(value, eager[name]), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_the_operator_is_one_for_torch(autocast):
    """Schema, shapes without values, and gradients, as `torch.library.opcheck` tests them."""
    scheme = QuantScheme(4, 16, symmetric=False)
    case = Case.make(scheme, torch.float32, lora=True, compensation=True).to(torch.float32)
    t, dtype = case.tensors, autocast or torch.float32
    latent = (t["weight"], *case.options["compensation"], t["lora_a"], t["lora_b"])
    fields = (scheme.bits, scheme.group_size, scheme.symmetric, None, False, None)
    scales = (t["scale"], t["zero_point"], None)
    arguments = (t["x"], t["bias"], *latent, *scales, 0.5, *fields, torch.float32, dtype, False)
    torch.library.opcheck(fake_quant_operator.operator, arguments)


def test_autocast_leaves_the_grid_alone():
    """`addmm` is on autocast's list: adapters in bfloat16 would give codes other than the packed ones."""
    case = Case.make(QuantScheme(4, 8), torch.bfloat16, lora=True).to(torch.float32)
    case.tensors["x"] = torch.eye(32, requires_grad=True)
    case.tensors["bias"] = torch.zeros(12, requires_grad=True)
    plain = case.run()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = case.run()
    assert mixed.dtype == torch.bfloat16
    assert torch.equal(mixed.float(), plain)
    t = case.tensors
    latent = Latent(t["weight"], None, Adapters(t["lora_a"], t["lora_b"], 0.7))
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = latent.rows(slice(None))
    assert torch.equal(under_autocast, latent.rows(slice(None)))


def test_adapters_of_a_stored_weight_have_the_gradients_of_a_float32_one():
    """Where scales train too, they come from the gradient of the weight: the whole one, not rounded like the weight."""
    weight, scheme = torch.randn(24, 32).bfloat16(), QuantScheme(4, 16)
    a, b, x, found = torch.randn(3, 32), torch.randn(24, 3), torch.randn(5, 32), []
    scale = choose_scale(weight.float(), scheme, torch.bfloat16)[0].float()
    for master in (weight, weight.float()):
        trains = [tensor.clone().requires_grad_() for tensor in (a, b, scale)]
        own = Grid(trains[2], None, scale, scheme, torch.bfloat16)
        y = fake_quant_linear(x, Latent(master, None, Adapters(trains[0], trains[1], 0.01)), own)
        found.append(torch.autograd.grad(y.square().sum(), trains))
    assert all(map(torch.equal, *found))
