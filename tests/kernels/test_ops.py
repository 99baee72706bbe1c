import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import ops
from llmqat.kernels.packed import Packed
from llmqat.quant.affine import choose_scale, dequantize, fake_quantize_activation, quantize
from llmqat.quant.packing import pack_rows, to_unsigned
from llmqat.scheme import QuantScheme

SHAPES = [(83, 544, 16), (1, 8, 8), (5, 77, -1), (33, 96, 1)]


def packed_layer(out_features, in_features, scheme, dtype=torch.float32):
    """Arguments of the operator after `x` up to the scheme's, and the dequantized weight."""
    weight = torch.randn(out_features, in_features)
    scale, zero_point = choose_scale(weight, scheme, dtype)
    codes = quantize(weight, scale, zero_point, scheme)
    packed_zero = None
    if zero_point is not None:
        packed_zero = pack_rows(zero_point.to(torch.uint8).T.contiguous(), scheme.bits).T.contiguous()
    packed = (pack_rows(to_unsigned(codes, scheme), scheme.bits), scale, packed_zero)
    return packed, codes, zero_point, dequantize(codes, scale, zero_point, scheme)


def to_meta(value):
    return value.to("meta") if torch.is_tensor(value) else value


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("x_shape", [(3, 2, 40), (40,), (0, 40)], ids=str)
def test_opcheck(symmetric, bias, act_bits, x_shape):
    packed, *_ = packed_layer(7, 40, QuantScheme(4, 8, symmetric))
    args = (torch.randn(x_shape), *packed, torch.randn(7) if bias else None, 4, 40, act_bits)
    torch.library.opcheck(torch.ops.llmqat.packed_linear.default, args)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_linear_on_the_dequantized_weight(bits, symmetric, shape, dtype, monkeypatch):
    out_features, in_features, group_size = shape
    packed, codes, zero_point, w_hat = packed_layer(
        out_features, in_features, QuantScheme(bits, group_size, symmetric), dtype
    )
    layer = Packed(*packed, None, bits, in_features, None)
    unpacked, unpacked_zero = layer.unpack(), layer.unpack_zero_point()
    assert torch.equal(unpacked, codes)
    assert (unpacked_zero is None) == (zero_point is None)
    if zero_point is not None:
        assert torch.equal(unpacked_zero, zero_point.to(torch.uint8))
    x, bias = torch.randn(4, 3, in_features, dtype=dtype), torch.randn(out_features)
    for act_bits, x_hat in ((None, x), (8, fake_quantize_activation(x))):
        y = ops.reference(x, Packed(*packed, bias, bits, in_features, act_bits))
        assert torch.equal(y, torch.nn.functional.linear(x_hat, w_hat, bias.to(dtype)))
    assert y.dtype == dtype
    whole = ops.packed_linear(x.double(), Packed(*packed, None, bits, in_features, None))
    monkeypatch.setattr(ops, "CHUNK_ELEMENTS", 3 * in_features)
    chunked = ops.packed_linear(x.double(), Packed(*packed, None, bits, in_features, None))
    torch.testing.assert_close(chunked, whole, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 17])
def test_error_is_that_of_plain_torch(bits, symmetric, dtype, tokens):
    packed, _, _, w_hat = packed_layer(29, 160, QuantScheme(bits, 32, symmetric), dtype)
    x = torch.randn(tokens, 160).to(dtype)
    exact = x.double() @ w_hat.double().T
    plain = (torch.nn.functional.linear(x, w_hat).double() - exact).abs().max()
    error = (ops.packed_linear(x, Packed(*packed, None, bits, 160, None)).double() - exact).abs().max()
    assert plain > 0
    assert error <= 2 * plain


@pytest.mark.parametrize("x_shape", [(0, 40), (2, 0, 40)], ids=str)
def test_empty_batch(symmetric, x_shape):
    packed, *_ = packed_layer(7, 40, QuantScheme(3, 8, symmetric))
    assert ops.packed_linear(torch.empty(x_shape), Packed(*packed, torch.randn(7), 3, 40, 8)).shape == (
        *x_shape[:-1],
        7,
    )


def test_strided_input():
    packed, _, _, w_hat = packed_layer(7, 40, QuantScheme(4, 8))
    x = torch.randn(40, 6).T
    torch.testing.assert_close(ops.packed_linear(x, Packed(*packed, None, 4, 40, None)), x @ w_hat.T)


@pytest.mark.parametrize("out_features", [1, 7, 8])
def test_few_rows_as_a_file_holds_them(bits, out_features):
    """With one word of zero points, a tensor read from a file has strides that `.T.contiguous()` keeps."""
    scheme = QuantScheme(bits, 8, symmetric=False)
    packed, codes, zero_point, _ = packed_layer(out_features, 40, scheme)
    read = [torch.empty(t.shape, dtype=t.dtype).copy_(t) for t in packed]
    layer = Packed(*read, None, bits, 40, None)
    assert torch.equal(layer.unpack(), codes)
    assert torch.equal(layer.unpack_zero_point(), zero_point.to(torch.uint8))
    x = torch.randn(2, 40)
    assert torch.equal(ops.packed_linear(x, layer), ops.packed_linear(x, Packed(*packed, None, bits, 40, None)))


def arguments(**changes):
    """Valid arguments of the operator by name, but for the changes."""
    packed, *_ = packed_layer(7, 40, QuantScheme(4, 8, symmetric=False))
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    own = {"x": torch.randn(2, 40), "bias": torch.randn(7), "bits": 4, "in_features": 40, "act_bits": None}
    return own | dict(zip(names, packed, strict=True)) | changes


WRONG = [
    ({"weight_packed": torch.zeros(7, 5, dtype=torch.int64)}, "weight_packed must be int32, got int64"),
    ({"weight_packed": torch.zeros(7, 5, dtype=torch.int8)}, "weight_packed must be int32, got int8"),
    ({"weight_packed": torch.zeros(35, dtype=torch.int32)}, r"must be matrices that are not empty, .* \(35,\) and"),
    ({"weight_packed": torch.zeros(0, 5, dtype=torch.int32)}, r"must be matrices that are not empty, .* \(0, 5\)"),
    ({"weight_packed": torch.zeros(7, 5, dtype=torch.int32).to_sparse()}, "weight_packed must be dense, got sparse"),
    ({"weight_scale": torch.ones(7, 3)}, r"weight_scale \(7, 3\) does not fit a weight of \(7, 40\)"),
    ({"weight_scale": torch.ones(6, 5)}, r"weight_scale \(6, 5\) does not fit"),
    ({"weight_scale": torch.ones(7, 0)}, r"must be matrices that are not empty, .* \(7, 0\)"),
    ({"weight_scale": torch.ones(7)}, r"must be matrices that are not empty, .* \(7,\)"),
    ({"weight_scale": torch.ones(7, 5, dtype=torch.int32)}, "weight_scale must be float32, .* got int32"),
    ({"weight_scale": torch.ones(7, 5, dtype=torch.complex64)}, "weight_scale must be float32, .* got complex64"),
    ({"weight_zero_point": torch.zeros(7, 5, dtype=torch.int32)}, r"packed along the rows: \(1, 5\), got \(7, 5\)"),
    ({"weight_zero_point": torch.zeros(1, 4, dtype=torch.int32)}, r"packed along the rows: \(1, 5\), got \(1, 4\)"),
    ({"weight_zero_point": torch.zeros(1, 5)}, "weight_zero_point must be int32, got float32"),
    ({"bias": torch.zeros(1)}, r"bias must have one value for each of the 7 rows, got the shape \(1,\)"),
    ({"bias": torch.zeros(())}, r"bias must have one value for each of the 7 rows, got the shape \(\)"),
    ({"bias": torch.zeros(7, 1)}, r"bias must have one value for each of the 7 rows, got the shape \(7, 1\)"),
    ({"bias": torch.zeros(7, dtype=torch.int64)}, "bias must be float32, .* got int64"),
    ({"bits": 3}, "40 codes of 3 bits take 4 words a row, weight_packed has 5"),
    ({"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
    ({"bits": 0}, "bits must be one of 2, 3, 4, 8, got 0"),
    ({"in_features": 39, "x": torch.zeros(2, 39)}, r"does not fit a weight of \(7, 39\)"),
    ({"in_features": -40}, "-40 codes of 4 bits take -5 words a row"),
    ({"act_bits": 4}, "act_bits must be 8, or None for float activations; got 4"),
    ({"act_bits": 0}, "act_bits must be 8, or None for float activations; got 0"),
    ({"x": torch.zeros(2, 39)}, r"x \(2, 39\) must end in the 40 features of the packed weight"),
    ({"x": torch.zeros(())}, r"x \(\) must end in the 40 features"),
    ({"x": torch.zeros(2, 40, dtype=torch.int32)}, "x must be float32, .* got int32"),
    ({"x": torch.zeros(2, 40, dtype=torch.complex64)}, "x must be float32, .* got complex64"),
    ({"x": None}, "x must be a tensor, got NoneType"),  # torch's schema lets None pass for a tensor
    ({"weight_packed": None}, "weight_packed must be a tensor, got NoneType"),
    ({"weight_scale": None}, "weight_scale must be a tensor, got NoneType"),
]


@pytest.mark.parametrize("mode", ["real", "fake"])
@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_a_wrong_argument_is_named_with_its_value(changes, message, mode):
    """Native code reads pointers: a wrong size would read, and write, beyond its tensors."""
    wrong = arguments(**changes)
    if mode == "fake":
        wrong = {name: to_meta(value) for name, value in wrong.items()}
    with pytest.raises(LlmqatError, match=message):
        torch.ops.llmqat.packed_linear(**wrong)


@pytest.mark.parametrize("name", ["x", "weight_packed", "weight_scale", "weight_zero_point", "bias"])
@pytest.mark.parametrize("others", ["cpu", "meta"])
def test_tensors_on_two_devices_are_refused(name, others):
    """Meta tensors among real ones have no memory that could be read."""
    devices = {key: others for key in arguments()} | {name: "meta" if others == "cpu" else "cpu"}
    split = {k: v.to(devices[k]) if torch.is_tensor(v) else v for k, v in arguments().items()}
    with pytest.raises(LlmqatError, match=r"(is on cpu, weight_packed on meta|is on meta, weight_packed on cpu); move"):
        torch.ops.llmqat.packed_linear(**split)


@pytest.mark.parametrize("name", ["x", "weight_packed", "weight_scale", "weight_zero_point", "bias"])
def test_strided_arguments_are_read_as_what_they_are(name):
    own = arguments()
    expected = torch.ops.llmqat.packed_linear(**own)
    strided = torch.stack([own[name]] * 2, dim=-1)[..., 0]
    assert not strided.is_contiguous()
    assert torch.equal(torch.ops.llmqat.packed_linear(**own | {name: strided}), expected)


def test_a_backward_pass_fails():
    packed, *_ = packed_layer(7, 40, QuantScheme(4, 8))
    y = ops.packed_linear(torch.randn(2, 40, requires_grad=True), Packed(*packed, None, 4, 40, None))
    with pytest.raises(LlmqatError, match="packed layers have no gradient: train the prepared model"):
        y.sum().backward()
