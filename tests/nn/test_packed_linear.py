import pytest
import torch
from torch import nn

from llmqat.errors import LlmqatError
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.grid import Adapters
from llmqat.quant.packing import packed_width
from llmqat.scheme import QuantScheme
from tests.quant.helpers import random_change

SHAPES = [(24, 64, 16), (83, 60, 15), (5, 77, -1), (1, 8, 8)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def trained(scheme, dtype, in_features=64, out_features=24, bias=True):
    layer = FakeQuantLinear.from_linear(nn.Linear(in_features, out_features, bias), scheme, dtype)
    with torch.no_grad():
        layer.scale *= 1 + 0.05 * torch.randn_like(layer.scale)
        layer.weight += 0.1 * torch.randn_like(layer.weight)
        if layer.zero_point is not None:
            layer.zero_point += 0.4 * torch.rand_like(layer.zero_point)
    return layer


def assert_same_grid(packed, layer, adapters=None):
    codes, scale, zero_point = packed.unpack()
    assert codes.dtype == layer.codes(adapters).dtype
    assert torch.equal(codes, layer.codes(adapters))
    assert scale.dtype == layer.storage_dtype
    assert torch.equal(scale, layer.stored_scale())
    if layer.zero_point is None:
        assert zero_point is None
    else:
        assert torch.equal(zero_point, layer.stored_zero_point())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packs_the_grid_of_the_forward(reference_op, bits, symmetric, shape, dtype):
    out_features, in_features, group_size = shape
    layer = trained(QuantScheme(bits, group_size, symmetric), dtype, in_features, out_features)
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    assert_same_grid(packed, layer)
    assert packed.weight_packed.shape == (out_features, packed_width(in_features, bits))
    assert packed.weight_shape.tolist() == [out_features, in_features]
    x = torch.randn(3, in_features, dtype=dtype)
    assert torch.equal(packed(x), layer(x)), "what runs is what was trained"


@pytest.mark.parametrize("act_bits", [None, 8])
def test_packs_adapters_compensation_and_code_scale(reference_op, symmetric, act_bits):
    layer = trained(QuantScheme(4, 16, symmetric, act_bits), torch.bfloat16)
    plain = layer.codes()
    layer.compensation = random_change(24, 64, 16, 0.05)
    layer.decouple_scale()
    layer.scale.data *= 1.07
    adapters = Adapters(torch.randn(3, 64) * 0.1, torch.randn(24, 3), 0.3)
    packed, x = PackedLinear.from_fake_quant(layer, layer.codes(adapters)), torch.randn(5, 64, dtype=torch.bfloat16)
    assert_same_grid(packed, layer, adapters)
    assert not torch.equal(layer.codes(adapters), plain)
    assert torch.equal(packed(x), layer(x, adapters))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shares_no_memory_with_training(dtype):
    layer = trained(QuantScheme(4, 16, False), dtype)
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    before = {name: t.clone() for name, t in packed.state_dict().items()}
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 1
    for name, value in packed.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_is_the_file(scheme, bias):
    layer = trained(scheme, torch.bfloat16, bias=bias)
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    state = packed.state_dict()
    expected = {"weight_packed": torch.int32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64}
    expected |= {} if scheme.symmetric else {"weight_zero_point": torch.int32}
    expected |= {"bias": torch.bfloat16} if bias else {}
    assert {name: t.dtype for name, t in state.items()} == expected
    fresh = PackedLinear(64, 24, scheme, torch.bfloat16, bias)
    fresh.load_state_dict(state)
    assert_same_grid(fresh, layer)
    x = torch.randn(2, 64)
    assert torch.equal(fresh(x), packed(x))
    on_meta = PackedLinear(64, 24, scheme, torch.bfloat16, bias, device="meta")
    assert {name: (t.shape, t.dtype) for name, t in on_meta.state_dict().items()} == {
        name: (t.shape, t.dtype) for name, t in state.items()
    }
    assert str(scheme) in repr(packed)


@pytest.mark.parametrize("to", [torch.float32, torch.float16, torch.float64], ids=str)
def test_casting_the_model_keeps_the_storage_dtype(to):
    layer = trained(QuantScheme(4, 16), torch.bfloat16)
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    nn.Sequential(packed).to(to)
    assert_same_grid(packed, layer)
    assert packed(torch.randn(2, 64, dtype=to)).dtype == to


def test_indivisible_group():
    with pytest.raises(LlmqatError, match="group_size 16 does not divide in_features 40"):
        PackedLinear(40, 8, QuantScheme(4, 16), torch.bfloat16)


@pytest.mark.parametrize("kernels", ["native", "reference"])
@pytest.mark.parametrize("ids", [[24], [0, -1], [10**9], [-(10**9)], [3, 5, 24]], ids=str)
def test_rows_that_are_not_there(kernels, ids, monkeypatch):
    """Native code would read beyond the matrix, and plain torch would count negative numbers from the end."""
    if kernels == "reference":
        monkeypatch.setattr("llmqat.kernels.native.supports", lambda *_: False)
    layer = trained(QuantScheme(4, 16, False), torch.bfloat16)
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    with pytest.raises(LlmqatError, match=r"row -?\d+ is out of range: the packed matrix has the rows 0 to 23; give"):
        packed.rows(torch.tensor(ids))


@pytest.mark.parametrize("kernels", ["native", "reference"])
def test_rows_by_integers_of_any_width(kernels, monkeypatch):
    if kernels == "reference":
        monkeypatch.setattr("llmqat.kernels.native.supports", lambda *_: False)
    layer = trained(QuantScheme(4, 16, False), torch.bfloat16)
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    expected = packed.rows(torch.tensor([3, 23, 0]))
    assert torch.equal(packed.rows(torch.tensor([3, 23, 0], dtype=torch.int32)), expected)
    assert packed.rows(torch.empty(0, dtype=torch.int64)).shape == (0, 64)
    with pytest.raises(LlmqatError, match=r"index must be int64, .* got float32"):
        packed.rows(torch.tensor([1.0]))
