"""Products with packed weights as GPUs find them, run by Triton's interpreter: bits and errors of torch."""

import pytest
import torch

from llmqat.kernels import native, ops
from llmqat.kernels.gpu import available, linear
from llmqat.kernels.gpu.tiles import Parts, Tile, parts_of, product_tile
from llmqat.kernels.packed import Packed
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import dequantize, fake_quantize_activation
from llmqat.scheme import QuantScheme
from tests.kernels.test_ops import packed_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (out, in, group): groups of whole and of odd sizes, tails in both directions. The interpreter takes its time for each
# program and operation, not for their size.
SHAPES = [(37, 160, 32), (20, 96, 48), (35, 256, 128), (7, 172, -1), (33, 77, 7), (5, 33, 1)]
TALL = Tile(64, 256, 4)


def layer_of(shape, bits, symmetric, stored, act_bits=None):
    """A layer of random weights, whose scales have both signs, and its ``W_hat``."""
    packed, *_ = packed_layer(*shape[:2], QuantScheme(bits, shape[2], symmetric), stored)
    scale = packed[1] * (1 - 2 * torch.randint(0, 2, packed[1].shape, dtype=stored))
    packed = Packed(packed[0], scale, packed[2], torch.randn(shape[0]), bits, shape[1], act_bits)
    return packed, w_hat_of(packed)


def w_hat_of(packed):
    return dequantize(packed.unpack(), packed.scale, packed.unpack_zero_point(), packed.scheme)


def same_bits(found, expected):
    as_integers = torch.int32 if found.dtype == torch.float32 else torch.int16
    return found.dtype == expected.dtype and torch.equal(found.view(as_integers), expected.view(as_integers))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_w_hat_is_that_of_torch_bit_for_bit(bits, symmetric, shape):
    turn = bits + SHAPES.index(shape)  # all pairs of dtypes are among the cases
    stored, dtype = DTYPES[turn % 3], DTYPES[(turn // 3 + symmetric) % 3]
    packed, w_hat = layer_of(shape, bits, symmetric, stored)
    assert same_bits(linear.dequantize(packed, dtype, tile=TALL), w_hat.to(dtype))


def test_rows_that_are_asked_for_are_those_of_the_whole(bits):
    packed, w_hat = layer_of((37, 96, 48), bits, False, torch.bfloat16)
    index = torch.tensor([36, 0, 3, 3], dtype=torch.int32)
    assert same_bits(linear.dequantize(packed, torch.bfloat16, index), w_hat[index])
    assert same_bits(linear.dequantize(packed, torch.bfloat16, slice(5, 22)), w_hat[5:22])
    assert linear.dequantize(packed, torch.bfloat16, index[:0]).shape == (0, 96)


def error_ratio(packed, w_hat, x):
    """Error of the kernel over that of plain torch in the dtype of `x`, root mean square."""
    x_hat = x if packed.act_bits is None else fake_quantize_activation(x)
    bias = packed.bias.to(x.dtype)
    exact = x_hat.double() @ w_hat.to(x.dtype).double().T + bias.double()
    plain = ops.reference(x, packed).double() - exact
    y = linear.multiply(x, packed)
    assert y.dtype == x.dtype
    return ((y.double() - exact).norm() / plain.norm()).item()


def test_error_is_that_of_plain_torch(bits, symmetric):
    shape = (70, 192, 48) if symmetric == (bits in (2, 8)) else (64, 300, -1)
    for stored, dtype, tokens in (
        (torch.float16, torch.float32, 3),
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.float32, torch.float16, 17),
    ):
        packed, w_hat = layer_of(shape, bits, symmetric, stored)
        assert error_ratio(packed, w_hat, torch.randn(tokens, shape[1]).to(dtype)) <= 2, (stored, dtype, tokens)


def test_products_of_small_integers_are_exact(bits, symmetric):
    """Where no sum is rounded every element is right, whatever the tile and the parts."""
    for dtype, tile, parts in (
        (torch.float32, TALL, Parts(1, 1)),
        (torch.bfloat16, Tile(64, 64, 4), Parts(2, 2)),
    ):
        packed, _ = layer_of((37, 240, 48), bits, symmetric, dtype)
        packed = packed._replace(scale=packed.scale.sign(), bias=torch.arange(37.0) - 18)
        x = torch.randint(-1, 2, (3, 240)).to(dtype)
        expected = (x.double() @ w_hat_of(packed).double().T + packed.bias.double()).to(dtype)
        assert torch.equal(linear.few_tokens(x, packed, tile, parts), expected), (tile, parts)


def test_many_tokens_are_multiplied_by_torch(symmetric, monkeypatch):
    packed, _ = layer_of((37, 96, 48), 4, symmetric, torch.bfloat16)
    x = torch.randn(70, 96).bfloat16()
    assert torch.equal(linear.multiply(x, packed), ops.reference(x, packed))
    monkeypatch.setattr(linear, "MOST_HELD", 96 * 30)
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 96 * 30)
    assert torch.equal(linear.multiply(x, packed), ops.reference(x, packed))


def test_int8_activations(symmetric):
    packed, w_hat = layer_of((70, 160, 32), 4, symmetric, torch.bfloat16, act_bits=8)
    for tokens in (1, 66):
        assert error_ratio(packed, w_hat, torch.randn(tokens, 160).bfloat16()) <= 2, tokens


def test_a_token_that_is_not_finite_stays_so():
    packed, _ = layer_of((20, 96, 48), 4, True, torch.bfloat16, act_bits=8)
    for tokens in (2, 65):
        x = torch.randn(tokens, 96).bfloat16()
        expected = linear.multiply(x, packed)
        x[-1, 40] = torch.inf
        y = linear.multiply(x, packed)
        assert y[-1].isnan().all()
        assert torch.equal(y[:-1], expected[:-1])


def test_memory_beyond_a_tensor_is_not_read(bits):
    """Tensors that end where others begin: the values beside them are NaN, and codes of all bits."""

    def amid(tensor, value):
        if tensor is None:
            return None
        room = torch.full((tensor.numel() + 1024,), value, dtype=tensor.dtype)
        return room[512 : 512 + tensor.numel()].view(tensor.shape).copy_(tensor)

    packed, w_hat = layer_of((37, 112, 16), bits, False, torch.bfloat16)
    fenced = Packed(
        amid(packed.codes, -1),
        amid(packed.scale, torch.nan),
        amid(packed.zero_point, -1),
        amid(packed.bias, torch.nan),
        *packed[4:],
    )
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(1, 112).to(dtype)
        assert torch.equal(linear.multiply(amid(x, torch.nan), fenced), linear.multiply(x, packed))
    assert same_bits(linear.dequantize(fenced, torch.bfloat16), w_hat)


def test_input_of_any_shape():
    packed, _ = layer_of((20, 96, 48), 4, True, torch.bfloat16)
    x = torch.randn(96, 2).bfloat16().T.unsqueeze(1)
    assert linear.multiply(x, packed).shape == (2, 1, 20)
    assert torch.equal(linear.multiply(x, packed), linear.multiply(x.contiguous(), packed))
    assert linear.multiply(x[:0], packed).shape == (0, 1, 20)
    assert torch.equal(linear.multiply(x[0, 0], packed), linear.multiply(x[0], packed)[0])


def test_what_the_kernels_know():
    packed, _ = layer_of((5, 33, 1), 4, True, torch.bfloat16)
    x = torch.randn(1, 33)
    assert linear.takes(x, packed)
    assert not linear.takes(x.double(), packed)
    assert not linear.takes(x, packed._replace(scale=packed.scale.double()))
    assert not linear.takes(x, packed._replace(bias=packed.bias.double()))


def test_groups_that_divide_units_are_dequantized_first(bits, monkeypatch):
    packed, _ = layer_of((33, 77, 7), bits, False, torch.bfloat16)
    monkeypatch.setattr(linear, "few_tokens", None)
    x = torch.randn(1, 77).bfloat16()
    assert torch.equal(linear.multiply(x, packed), ops.reference(x, packed))


@pytest.fixture
def gpu(monkeypatch):
    """CPU tensors are taken for those of a GPU, and the compiled kernels do not know them; what the kernels did."""
    did = []
    monkeypatch.setattr(native, "supports", lambda *_: False)
    monkeypatch.setattr(ops, "runs_inference_on", lambda device: True)
    for name in ("few_tokens", "many_tokens", "dequantize"):
        monkeypatch.setattr(linear, name, noted(did, name, getattr(linear, name)))
    return did


def noted(did, name, run):
    def note(*args, **options):
        did.append(name)
        return run(*args, **options)

    return note


def test_a_layer_runs_on_the_kernels(gpu):
    packed, w_hat = layer_of((20, 96, 48), 4, False, torch.bfloat16)
    layer = PackedLinear(96, 20, QuantScheme(4, 48, False), torch.bfloat16)
    layer.weight_packed, layer.weight_scale, layer.weight_zero_point = packed[:3]
    index = torch.tensor([19, 0, 0])
    assert torch.equal(layer.rows(index), w_hat[index])
    for tokens in (2, 65):
        x = torch.randn(tokens, 96).bfloat16()
        torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, w_hat))
    assert layer(torch.randn(2, 96).double()).dtype == torch.float64
    assert gpu == ["dequantize", "few_tokens", "many_tokens", "dequantize"]


def test_reports_name_what_multiplies(monkeypatch):
    device = torch.device("cuda")
    monkeypatch.setattr(available, "_missing_on", lambda device: None)
    monkeypatch.setenv("LLMQAT_TRAINING", "torch")
    assert native.kernel_name(device) == "triton"
    assert "LLMQAT_TRAINING leaves it to torch" in available.explain(device)
    monkeypatch.setenv("LLMQAT_KERNELS", "reference")
    assert native.kernel_name(device) == "reference"
    monkeypatch.delenv("LLMQAT_KERNELS")
    monkeypatch.setattr(available, "_missing_on", lambda device: "no chip")
    assert native.kernel_name(device) == "reference"
    assert not available.runs_inference_on(torch.device("cpu"))


@pytest.mark.parametrize("columns", [32, 576, 4096, 14336])
def test_parts_cover_the_columns_once(columns, bits):
    for rows, together in ((576, True), (4096, False), (128256, True)):
        tile = product_tile(bits, columns, together)
        parts = parts_of(columns, tile.width, -(-rows // tile.rows))
        assert (parts.number - 1) * parts.steps * tile.width < columns <= parts.number * parts.steps * tile.width
