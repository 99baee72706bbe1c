import pytest
import torch

from llmqat.compat.torch import watching_operators
from llmqat.errors import LlmqatError
from llmqat.quant.affine import (
    RELATIVE_SCALE_FLOOR,
    check_weight,
    choose_scale,
    dequantize,
    fake_quantize_activation,
    fake_quantize_input,
    grouped,
    quantize,
    quantize_activation,
    ranges_of,
    round_scale,
    store,
)
from llmqat.scheme import QuantScheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def round_trip(weight, scheme, dtype):
    scale, zero_point = choose_scale(weight, scheme, dtype)
    codes = quantize(weight, scale, zero_point, scheme)
    return scale, zero_point, codes, dequantize(codes, scale, zero_point, scheme)


@pytest.mark.parametrize("dtype", DTYPES)
def test_largest_entry_maps_to_the_bottom_of_the_range(bits, dtype):
    scheme, weight = QuantScheme(bits, 16), torch.randn(64, 80)
    scale, zero_point, codes, w_hat = round_trip(weight, scheme, dtype)
    assert scale.shape == (64, 5)
    assert scale.dtype == w_hat.dtype == dtype
    assert zero_point is None
    assert codes.dtype == torch.int8
    at = grouped(weight, scheme).abs().argmax(-1, keepdim=True)
    extreme = grouped(weight, scheme).gather(-1, at)
    assert (grouped(codes, scheme).gather(-1, at) == scheme.qmin).all()
    assert ((scale < 0) == (extreme.squeeze(-1) > 0)).all(), "the scale is negative where the largest entry is positive"
    assert (scale < 0).any()
    assert (scale > 0).any()
    reached = grouped(w_hat, scheme).gather(-1, at).to(torch.float64)
    half_ulp = torch.finfo(dtype).eps / 2
    assert ((reached / extreme - 1).abs() <= half_ulp * 1.01).all()


def test_range_is_used_and_error_stays_within_a_step(scheme):
    weight = torch.randn(48, 96) + 0.3
    scale, zero_point, codes, w_hat = round_trip(weight, scheme, torch.float32)
    assert codes.min() == scheme.qmin
    assert codes.max() == scheme.qmax
    steps = grouped(w_hat - weight, scheme).abs() / scale.abs().unsqueeze(-1)
    assert steps.max() <= 1.001
    assert steps.mean() < 0.3, "a uniform rounding error has mean 1/4"
    if zero_point is not None:
        assert codes.dtype == torch.uint8
        assert torch.equal(zero_point, zero_point.round().clamp(scheme.qmin, scheme.qmax))


@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_range_is_widened_to_hold_zero(bits, sign):
    scheme = QuantScheme(bits, 8, symmetric=False)
    weight = sign * (5 + torch.rand(4, 16))
    scale, zero_point = choose_scale(weight, scheme, torch.float32)
    assert (zero_point == (scheme.qmin if sign > 0 else scheme.qmax)).all()
    zeros = quantize(torch.zeros_like(weight), scale, zero_point, scheme)
    assert (dequantize(zeros, scale, zero_point, scheme) == 0).all()


def test_shrink_and_flip():
    scheme, weight = QuantScheme(4, 16), torch.randn(8, 32)
    scale, _ = choose_scale(weight, scheme, torch.float32)
    assert torch.equal(ranges_of(weight, scheme).scale(scheme, torch.float32, shrink=0.5)[0], scale * 0.5)
    assert torch.equal(ranges_of(weight, scheme).scale(scheme, torch.float32, flip=True)[0], -scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("exponent", [-40, -12, 20])
def test_scales_with_the_weight(scheme, dtype, exponent):
    """The floor is relative: weights of 1e-12 get the same codes as weights of 1."""
    weight, factor = torch.randn(16, 32), 2.0**exponent
    scale, _, codes, _ = round_trip(weight, scheme, dtype)
    other_scale, _, other_codes, _ = round_trip(weight * factor, scheme, dtype)
    assert torch.equal(other_codes, codes)
    assert torch.equal(other_scale, scale * factor)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-12, 1.0, "huge"])
def test_degenerate_groups_stay_finite(scheme, dtype, magnitude):
    weight = torch.randn(4, 64) * (torch.finfo(dtype).max / 16 if magnitude == "huge" else magnitude)
    weight[:, 16:32] = 0
    scale, _zero_point, codes, w_hat = round_trip(weight, scheme, dtype)
    assert scale.isfinite().all()
    assert w_hat.isfinite().all()
    assert (scale != 0).all()
    assert (w_hat[:, 16:32] == 0).all()
    assert codes.min() >= scheme.qmin
    assert codes.max() <= scheme.qmax


def test_a_group_of_zeros_takes_the_floor_of_its_tensor():
    weight = torch.randn(4, 32)
    weight[:, :16] = 0
    scale, _ = choose_scale(weight, QuantScheme(4, 16), torch.float32)
    assert torch.equal(scale[:, 0], (weight.abs().max() * RELATIVE_SCALE_FLOOR).expand(4))
    assert (choose_scale(torch.zeros(4, 32), QuantScheme(4, 16), torch.float32)[0] == 1).all()


def test_store_keeps_sign_and_limits():
    scale = torch.tensor([1e-9, -1e-9, 0.0, 1e9, -1e9, -0.3])
    floor = torch.tensor(1e-3)
    assert torch.equal(
        store(scale, floor, torch.float16),
        torch.tensor([1e-3, -1e-3, 1e-3, 65504, -65504, -0.3], dtype=torch.float16),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_that_are_float16_numbers(dtype, symmetric):
    """Chosen and trained ones, down to those that float16 holds with few bits."""
    weight = torch.randn(64, 32) * torch.logspace(-6, 3, 64)[:, None]
    scheme = QuantScheme(4, 16, symmetric, scale_dtype="float16")
    chosen, _ = choose_scale(weight, scheme, dtype)
    for scale in (chosen, round_scale(1.01 * chosen.float(), scheme, dtype)):
        assert scale.dtype == dtype
        assert torch.equal(scale.to(torch.float16).to(dtype), scale)
    assert chosen.all()
    assert torch.equal(round_scale(chosen.float(), scheme, dtype), chosen)


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounds_half_to_even(weight_dtype):
    weight = torch.tensor([[0.5, 1.5, 2.5, -0.5, -1.5, 9.0]], dtype=weight_dtype)
    codes = quantize(weight, torch.ones(1, 1), None, QuantScheme(4, -1))
    assert codes.tolist() == [[0, 2, 2, 0, -2, 7]]
    shifted = quantize(weight, torch.ones(1, 1), torch.full((1, 1), 3.0), QuantScheme(4, -1, symmetric=False))
    assert shifted.tolist() == [[3, 5, 5, 3, 1, 12]]


def test_float64_weights_are_quantized_in_float64():
    weight = torch.tensor([[0.5 + 1e-12, 1.0]], dtype=torch.float64)
    assert quantize(weight, torch.ones(1, 1), None, QuantScheme(4, -1))[0, 0] == 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_dequantize_rounds_the_product_once(scheme, dtype):
    weight = torch.randn(16, 64)
    scale, zero_point, codes, w_hat = round_trip(weight, scheme, dtype)
    z = 0 if zero_point is None else zero_point.double().unsqueeze(-1)
    exact = (grouped(codes.double(), scheme) - z) * scale.double().unsqueeze(-1)
    assert torch.equal(w_hat, exact.flatten(-2).to(dtype))


def test_a_group_that_does_not_divide_names_the_remedy():
    with pytest.raises(LlmqatError, match="group_size 16 does not divide in_features 40; choose a divisor of 40"):
        choose_scale(torch.randn(2, 40), QuantScheme(4, 16), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_activations_per_token(dtype):
    x = (torch.randn(3, 5, 33) * torch.logspace(-3, 3, 5).unsqueeze(-1)).to(dtype)
    x[1, 2] = 0
    codes, scale = quantize_activation(x)
    assert codes.dtype == torch.int8
    assert scale.shape == (3, 5, 1)
    assert scale[1, 2] == 1
    assert (codes[1, 2] == 0).all()
    largest = codes.int().abs().amax(-1)
    assert (largest[largest > 0] == 127).all()
    assert (largest == 0).sum() == 1
    x_hat = fake_quantize_activation(x)
    assert x_hat.dtype == dtype
    assert torch.equal(x_hat, (codes * scale).to(dtype))
    step = scale.to(torch.float64)
    rounding = torch.finfo(dtype).eps * x.abs().to(torch.float64)
    assert ((x_hat.double() - x.double()).abs() <= 0.5001 * step + rounding).all()
    assert torch.equal(fake_quantize_activation(x[:1]), x_hat[:1]), "a token does not depend on its batch"


def test_inputs_as_a_layer_multiplies_them():
    x, scale = torch.randn(3, 32), torch.tensor([0.5]).bfloat16()
    assert fake_quantize_input(x, QuantScheme(4, 16), None) is x
    dynamic, static = QuantScheme(4, 16, act_bits=8), QuantScheme(4, 16, act_bits=8, act_static=True)
    assert torch.equal(fake_quantize_input(x, dynamic, None), fake_quantize_activation(x))
    assert torch.equal(fake_quantize_input(x, static, scale), (2 * x).round() / 2)
    with pytest.raises(AssertionError):
        fake_quantize_input(x, static, None)  # never as if it were dynamic


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_a_token_that_is_not_finite_is_nan(dtype, value):
    x = torch.randn(3, 33).to(dtype)
    expected = fake_quantize_activation(x)
    x[1, 7] = value
    x_hat = fake_quantize_activation(x)
    assert x_hat[1].isnan().all()
    assert torch.equal(x_hat[[0, 2]], expected[[0, 2]])


@pytest.mark.parametrize("std", [1e-3, 1e-4, 1e-5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_small_weights_keep_their_accuracy_in_float16(std, bits, symmetric):
    """Scales of small weights lie below the normal numbers of float16, which goes on to 6e-8."""
    weight, scheme = torch.randn(64, 128) * std, QuantScheme(bits, 32, symmetric)
    error = {dtype: (round_trip(weight, scheme, dtype)[3].float() - weight).norm() for dtype in DTYPES}
    assert error[torch.float16] <= 1.5 * error[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_tensor_of_zeros_stays_one(scheme, dtype):
    check_weight(torch.zeros(4, 32), scheme, dtype, "zeros")
    scale, _, _, w_hat = round_trip(torch.zeros(4, 32), scheme, dtype)
    assert torch.equal(w_hat.float(), torch.zeros(4, 32))
    assert (scale != 0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_weights_that_are_not_finite_are_refused(scheme, value, dtype):
    weight = torch.randn(4, 32, dtype=dtype)
    weight[2, 7] = value
    with pytest.raises(LlmqatError, match=r"the weight of model.q_proj holds NaN or infinity; copy the model again"):
        check_weight(weight, scheme, torch.bfloat16, "model.q_proj")


def test_weights_beyond_the_storage_dtype_are_refused(scheme):
    """Their grid would end in infinity, or in codes of zero, without a word."""
    weight = torch.randn(4, 32)
    for factor, message in ((1e6, "reaches .*, the grid holds .* in float16; store"), (1e-9, "reaches .* only, less")):
        scaled = weight * factor
        with pytest.raises(LlmqatError, match=rf"the weight of a {message}"):
            check_weight(scaled, scheme, torch.float16, "a")
        check_weight(scaled, scheme, torch.bfloat16, "a")
    with pytest.raises(LlmqatError, match=r"less than the smallest scale in bfloat16, 1.18e-38; store"):
        check_weight(weight * 1e-40, scheme, torch.bfloat16, "a")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_largest_weights_that_are_taken_stay_finite(bits, symmetric):
    scheme, limit = QuantScheme(bits, 16, symmetric), 65504 / (1.01 if symmetric else 1.5)
    for seed in range(20):
        torch.manual_seed(seed)
        weight = (torch.rand(8, 64) * 2 - 1) * limit
        check_weight(weight, scheme, torch.float16, "a")
        assert torch.isfinite(round_trip(weight, scheme, torch.float16)[3]).all()


def test_scales_of_activations_are_true_quotients_on_every_device():
    """A GPU multiplies by the rounded reciprocal of a Python number, and may be a bit off; never so with a tensor."""
    divisors = []

    def seen(operator, args, *_):
        divisors.extend(args[1:] if operator.overloadpacket is torch.ops.aten.div else [])

    with watching_operators(seen):
        quantize_activation(torch.randn(3, 8))
    assert len(divisors) == 2
    assert all(isinstance(divisor, torch.Tensor) for divisor in divisors)
