import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant import grid
from llmqat.quant.affine import choose_scale, dequantize
from llmqat.quant.grid import Adapters
from llmqat.scheme import QuantScheme
from tests.quant.helpers import random_change

IN, OUT = 64, 24
SCHEME = QuantScheme(4, 16)
VARIANTS = [{}, {"code_scale": True}, {"compensation": True}, {"lora": True}, {"compensation": True, "lora": True}]


def make(scheme=SCHEME, dtype=torch.float32, lora=False, compensation=False, code_scale=False, **kwargs):
    """A layer that looks as if it had been trained, and the adapters of its forward, if asked for."""
    layer = FakeQuantLinear.from_linear(nn.Linear(IN, OUT), scheme, dtype, **kwargs)
    with torch.no_grad():
        layer.scale *= 1 + 0.05 * torch.randn_like(layer.scale)
        if layer.zero_point is not None:
            layer.zero_point += 0.4 * torch.rand_like(layer.zero_point)
        if compensation:
            layer.compensation = random_change(OUT, IN, 16, 0.05)
        if code_scale:
            layer.decouple_scale()
            layer.scale *= 1.1
    adapters = Adapters(torch.randn(3, IN) * 0.1, torch.randn(OUT, 3), 0.3)
    return layer, adapters if lora else None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_takes_over_the_parameter_objects(scheme, dtype):
    linear = nn.Linear(IN, OUT, dtype=dtype).eval()
    weight, bias, before = linear.weight, linear.bias, linear.weight.detach().clone()
    layer = FakeQuantLinear.from_linear(linear, scheme, torch.bfloat16)
    assert layer.weight is weight
    assert layer.bias is bias
    assert weight.dtype == bias.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(weight, before.to(weight.dtype))
    assert not layer.training
    scale, zero_point = choose_scale(before, scheme, torch.bfloat16)
    assert layer.scale.dtype == torch.float32
    assert torch.equal(layer.stored_scale(), scale)
    assert scheme.symmetric == (layer.zero_point is None) == (layer.stored_zero_point() is None)
    if zero_point is not None:
        assert torch.equal(layer.stored_zero_point(), zero_point.to(torch.uint8))
        assert not layer.zero_point.requires_grad
    assert not isinstance(layer, nn.Linear)
    assert str(scheme) in repr(layer)


def test_a_frozen_weight_keeps_its_dtype_and_its_grid():
    linear = nn.Linear(IN, OUT).bfloat16()
    frozen = FakeQuantLinear.from_linear(copy.deepcopy(linear).requires_grad_(False), SCHEME, torch.bfloat16)
    master = FakeQuantLinear.from_linear(linear, SCHEME, torch.bfloat16)
    assert frozen.weight.dtype == frozen.bias.dtype == torch.bfloat16
    assert torch.equal(frozen.scale, master.scale)
    assert torch.equal(frozen.codes(), master.codes())
    x = torch.randn(3, IN)
    for enabled in (True, False):
        frozen.enabled = master.enabled = enabled
        assert torch.equal(frozen(x), master(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(frozen(x), master(x))
    master.weight.data += 2.0**-12
    frozen.load_state_dict(master.state_dict())
    assert torch.equal(frozen.codes(), master.codes()), "a state of masters is not rounded"
    assert torch.equal(frozen.weight, master.weight)


def test_is_planned_on_meta():
    with torch.device("meta"):
        layer = FakeQuantLinear.from_linear(nn.Linear(IN, OUT, bias=False), QuantScheme(4, 16, False), torch.bfloat16)
    assert layer.weight.is_meta
    assert layer.bias is None
    assert layer.zero_point.shape == layer.scale.shape == (OUT, 4)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "+".join(v) or "plain")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_runs_on_codes_and_scale(scheme, dtype, variant, monkeypatch):
    layer, adapters = make(scheme, dtype, **variant)
    codes = layer.codes(adapters)
    assert codes.dtype == (torch.int8 if scheme.symmetric else torch.uint8)
    w_hat = dequantize(codes, layer.stored_scale(), layer.stored_zero_point(), scheme)
    y = layer(torch.eye(IN), adapters) - layer.bias
    layer.bias = None
    assert torch.equal(layer(torch.eye(IN), adapters).T, w_hat.float())
    torch.testing.assert_close(y.T, w_hat.float(), atol=1e-6, rtol=1e-5)
    if adapters is None:
        assert torch.equal(layer.quantized_weight(), w_hat)
    assert torch.equal(layer.codes(adapters), codes)
    monkeypatch.setattr(grid, "CHUNK_ELEMENTS", 6 * IN)
    assert torch.equal(layer.codes(adapters), codes)


def test_latent_is_what_is_quantized():
    layer, _ = make(compensation=True)
    assert torch.equal(layer.latent().rows(slice(None)), layer.weight + layer.compensation.values(torch.float32))


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), nn.Module.half, nn.Module.double])
def test_casting_the_model_keeps_masters_and_grid(cast):
    layer, _ = make(QuantScheme(4, 16, False), torch.bfloat16, compensation=True, code_scale=True)
    model = nn.Sequential(nn.LayerNorm(IN), layer)
    before, codes = {name: t.clone() for name, t in layer.state_dict().items()}, layer.codes()
    weight, storage_dtype = layer.weight, layer.storage_dtype
    cast(model)
    assert model[0].weight.dtype != torch.float32
    assert layer.weight is weight
    assert layer.storage_dtype == storage_dtype
    for name, value in layer.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])
    assert torch.equal(layer.codes(), codes)
    x = torch.randn(2, IN, dtype=model[0].weight.dtype)
    y = model(x)
    assert y.dtype == x.dtype
    y.sum().backward()
    assert layer.weight.grad.dtype == layer.scale.grad.dtype == torch.float32
    assert model.to("meta")[1].weight.is_meta


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoupled_scales_train_without_moving_codes(dtype):
    layer, _ = make(QuantScheme(4, 16), dtype)
    codes, stored = layer.codes(), layer.stored_scale().clone()
    layer.decouple_scale()
    y = layer(torch.eye(IN))
    with torch.no_grad():
        layer.scale *= 1.5
    layer.decouple_scale()  # again: changes nothing
    assert torch.equal(layer.codes(), codes)
    assert torch.equal(layer.code_scale, stored.float())
    assert torch.equal(layer.quantized_weight(), dequantize(codes, layer.stored_scale(), None, layer.scheme))
    assert not torch.equal(layer(torch.eye(IN)), y)
    layer.set_grid(layer.scale.detach().clone(), None)
    assert layer.code_scale is None
    assert not torch.equal(layer.codes(), codes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_disabled_is_the_float_layer(dtype):
    layer, adapters = make(compensation=True, lora=True)
    layer.enabled = False
    x = torch.randn(2, 3, IN, dtype=dtype)
    expected = nn.functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))
    assert torch.equal(layer(x), expected)
    adapted = layer.weight + 0.3 * adapters.b @ adapters.a
    y = layer(x, adapters)
    assert y.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(y.float(), nn.functional.linear(x.float(), adapted, layer.bias), rtol=0, atol=atol)


def test_state_dict_carries_the_whole_grid():
    for variant in ({}, {"code_scale": True, "compensation": True}):
        layer, _ = make(QuantScheme(4, 16, False), torch.bfloat16, **variant)
        other, _ = make(QuantScheme(4, 16, False), torch.bfloat16, code_scale=not variant)
        other.load_state_dict(copy.deepcopy(layer.state_dict()))
        assert torch.equal(other.codes(), layer.codes())
        assert torch.equal(other.quantized_weight(), layer.quantized_weight())
        assert (other.code_scale is None) == (other.compensation is None) == (not variant)
        other.load_state_dict({}, strict=False)  # that of adapters alone, as peft loads them
        assert torch.equal(other.codes(), layer.codes())


def test_tensors_are_in_the_order_of_earlier_versions():
    """In which `hash_of_base` takes them: a checkpoint says which base it stands on."""
    layer, _ = make(QuantScheme(8, 16, False, act_bits=8, act_static=True), compensation=True, code_scale=True)
    grid = ["scale", "zero_point", "compensation_multiples", "compensation_step", "code_scale"]
    assert list(layer.state_dict()) == ["weight", "bias", *grid, "act_state", "act_scale"]
    assert not layer.code_scale.requires_grad


def test_clipped_counts_latents_beyond_the_grid(symmetric):
    layer, _ = make(QuantScheme(4, 16, symmetric))
    assert layer.clipped() < 0.1 * layer.weight.numel()
    with torch.no_grad():
        layer.scale.fill_(1.0)
        layer.weight.zero_()
        layer.zero_point = None if symmetric else nn.Parameter(torch.full_like(layer.scale, 8.0))
        layer.weight[0, :6] = torch.tensor([7.49, 7.51, -8.49, -8.51, 100, -100])
    assert layer.clipped() == 4
    one = torch.ones(1, IN)
    assert layer.clipped(Adapters(one, torch.ones(OUT, 1), 14.0)) == layer.weight.numel() - 2


def gradients(layer, run, x):
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = run(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters() if p is not layer.code_scale)]


@pytest.mark.parametrize("variant", [{}, {"lora": True, "clip_mask": True, "code_scale": True}], ids=["plain", "all"])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_checkpointing_changes_nothing(variant, act_bits, symmetric):
    layer, adapters = make(QuantScheme(4, 16, symmetric, act_bits), torch.bfloat16, **variant)
    layer.requires_grad_(True)
    x = torch.randn(2, 3, IN)
    plain = gradients(layer, lambda x: layer(x, adapters), x)
    again = gradients(layer, lambda x: checkpoint(layer, x, adapters, use_reentrant=False), x)
    for a, b in zip(plain, again, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("act_bits", [None, 8])
def test_autocast_gradients_are_close_to_float32(symmetric, act_bits):
    layer, adapters = make(QuantScheme(4, 16, symmetric, act_bits), torch.bfloat16, lora=True)
    adapters = Adapters(nn.Parameter(adapters.a), nn.Parameter(adapters.b), adapters.scaling)
    layer.lora_a, layer.lora_b, _ = adapters
    x = torch.randn(8, 16, IN)

    def mixed(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x, adapters)

    layer.requires_grad_(True)
    plain, half = gradients(layer, lambda x: layer(x, adapters), x), gradients(layer, mixed, x)
    assert half[0].dtype == torch.bfloat16
    for expected, value in zip(plain[1:], half[1:], strict=True):
        assert value.dtype == torch.float32
        if expected.norm() > 0:
            cosine = torch.cosine_similarity(expected.flatten(), value.flatten(), dim=0)
            assert cosine > 0.999
            assert (value - expected).norm() < 0.05 * expected.norm()


def test_used_twice_in_one_graph_gradients_add_up(symmetric):
    layer, _ = make(QuantScheme(4, 16, symmetric), clip_mask=True)
    layer.requires_grad_(True)
    x1, x2 = torch.randn(4, IN), torch.randn(5, IN)
    separate = [gradients(layer, layer, x)[2:] for x in (x1, x2)]
    layer.zero_grad()
    (layer(x1).square().sum() + layer(x2).square().sum()).backward()
    for p, a, b in zip(layer.parameters(), *separate, strict=True):
        torch.testing.assert_close(p.grad, a + b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "variant", [*VARIANTS, {"lora": True, "clip_mask": True}], ids=lambda v: "+".join(v) or "plain"
)
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_of_weight_size_is_saved_but_the_weight(variant, storage_dtype, symmetric):
    layer, adapters = make(QuantScheme(4, 16, symmetric, 8), storage_dtype, **variant)
    if adapters is not None:
        adapters = Adapters(nn.Parameter(adapters.a), nn.Parameter(adapters.b), adapters.scaling)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        layer(torch.randn(2, IN, dtype=torch.bfloat16, requires_grad=True), adapters)
    allowed = {t.data_ptr() for t in (layer.weight, layer.compensation_multiples) if t is not None}
    large = {t.data_ptr() for t in saved if t.numel() >= layer.weight.numel()}
    assert layer.weight.data_ptr() in large
    assert large <= allowed


def test_float64_inputs_reach_coupled_scales():
    layer, _ = make(QuantScheme(4, 16, True), torch.float32)
    layer.scale.requires_grad_(True)
    layer(torch.randn(2, IN, dtype=torch.float64)).sum().backward()
    assert layer.scale.grad is not None
