"""Every instruction set of the compiled kernels against float64 through the torch reference."""

import pytest
import torch

from llmqat.kernels import native, ops
from llmqat.kernels.packed import Packed
from llmqat.quant.affine import dequantize, fake_quantize_activation, quantize_activation
from llmqat.quant.packing import pack_rows, to_unsigned
from llmqat.scheme import QuantScheme
from tests.covering import every
from tests.kernels.test_ops import packed_layer

BITS, SYMMETRIC = (2, 3, 4, 8), (True, False)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# (out, in, group_size): groups of whole and of odd sizes, tails in both directions.
SHAPES = [
    (70, 256, 128),
    (22, 2304, 128),
    (19, 768, 256),
    (64, 160, 32),
    (53, 96, 48),
    (66, 192, 64),
    (33, 80, 16),
    (90, 172, -1),
    (37, 80, -1),  # less than a block of any kernel
    (130, 640, 320),
]
LONG_GROUPS = [(60, 3072, 1536), (61, 2500, -1)]  # their sums are not exact in float32


def exact_product(x, w_hat, codes, zero_point, scale, act_bits):
    """float64; of integers where `act_bits` keeps them: there neither W_hat nor x_hat is rounded on the way."""
    finer = x.dtype != torch.bfloat16 and scale.dtype not in (torch.float32, x.dtype)
    if act_bits is None or finer:
        x_hat = x if act_bits is None else fake_quantize_activation(x)
        return x_hat.double() @ w_hat.double().T
    q, x_scale = quantize_activation(x)
    group = codes.shape[1] // scale.shape[1]
    centered = codes.double()
    if zero_point is not None:
        centered -= zero_point.double().repeat_interleave(group, 1)
    return (q.double() * x_scale.double()) @ (centered * scale.double().repeat_interleave(group, 1)).T


def error_ratio(shape, bits, symmetric, stored, dtype, act_bits, tokens):
    """Error of the kernel over that of plain torch in the dtype of `x`, root mean square."""
    scheme = QuantScheme(bits, shape[2], symmetric)
    packed, codes, zero_point, w_hat = packed_layer(*shape[:2], scheme, stored)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0])
    exact = exact_product(x, w_hat, codes, zero_point, packed[1], act_bits) + bias.double()
    x_hat = x if act_bits is None else fake_quantize_activation(x)
    plain = torch.nn.functional.linear(x_hat, w_hat.to(dtype), bias.to(dtype)).double() - exact
    y = ops.packed_linear(x, Packed(*packed, bias, bits, shape[1], act_bits))
    assert y.dtype == dtype
    return ((y.double() - exact).norm() / plain.norm()).item()


@pytest.mark.parametrize(
    ("bits", "symmetric", "shape", "act_bits"), every(3, BITS, SYMMETRIC, SHAPES, (None, 8)), ids=str
)
def test_error_is_that_of_plain_torch(isa, bits, symmetric, shape, act_bits):
    for stored in DTYPES:
        for dtype in DTYPES:
            for tokens in (1, 3, 7, 18, 40) if stored == dtype else (1, 40):
                ratio = error_ratio(shape, bits, symmetric, stored, dtype, act_bits, tokens)
                assert ratio <= 2, (stored, dtype, tokens)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_rows_are_those_of_w_hat(isa, bits, symmetric, stored):
    for shape in SHAPES:
        packed, *_, w_hat = packed_layer(*shape[:2], QuantScheme(bits, shape[2], symmetric), stored)
        index = torch.tensor([shape[0] - 1, 0, 3, 3])
        assert torch.equal(
            native.Layer(Packed(*packed, None, bits, shape[1], None)).rows(index), w_hat[index].to(stored)
        )


COUNTS = (1, 7, 31, 64, 65, 500, 2048, 2049, 9000)  # of values: parts of a vector, and more than one chunk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_is_that_of_numpy(isa, dtype):
    """Ties, zeros of both signs, infinities, in all places."""
    generator, infinity = torch.Generator().manual_seed(0), float("inf")
    pools = [
        [-3.0, -2.5, -2.5, -7.0],
        [-1.0, -0.0, 0.0, -5e-8],
        [1.5, 60000.0, 2.0, -60000.0],
        [infinity, -infinity, 3.0, 2.0],
        [-infinity, -infinity],
    ]
    for count in COUNTS:
        for pool in pools:
            x = torch.full((count,), min(pool), dtype=dtype)
            for _ in range(4):
                places = torch.randint(count, (max(count // 400, 2),), generator=generator)
                chosen = torch.randint(len(pool), places.shape, generator=generator)
                x[places] = torch.tensor(pool, dtype=dtype)[chosen]
                assert native.argmax(x) == x.float().numpy().argmax(), (count, pool, places, chosen)
        x = torch.randn(count, generator=generator).to(dtype)
        assert native.argmax(x) == x.float().numpy().argmax()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_finds_the_first_nan(isa, dtype):
    """Of either sign, before infinities."""
    negative = torch.tensor(-1, dtype=torch.int32 if dtype == torch.float32 else torch.int16).view(dtype)
    for count in COUNTS:
        for nan in (negative, torch.tensor(float("nan"), dtype=dtype)):
            x = torch.full((count,), float("inf"), dtype=dtype)
            for place in (count - 1, count // 2, count // 3, 0):
                x[place] = nan
                assert native.argmax(x) == place == x.float().numpy().argmax(), (count, nan)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("shape", LONG_GROUPS, ids=str)
def test_long_groups(isa, bits, symmetric, shape, act_bits):
    for tokens in (1, 2, 9):
        assert error_ratio(shape, bits, symmetric, torch.float32, torch.float32, act_bits, tokens) <= 2, tokens


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("shape", [(70, 1152, 128), (33, 704, 64), (130, 640, 320), (40, 1100, -1)], ids=str)
def test_many_tokens(isa, shape, act_bits):
    assert error_ratio(shape, 4, True, torch.bfloat16, torch.bfloat16, act_bits, tokens=145) <= 2


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("size", [2.0**-140, 2.0**-126, 1e-30, 1.0, 0.01, 2e36])
def test_activations_round_as_in_training(isa, size, tokens):
    """Ties and their neighbours, and scales whose inverse is no float32: the codes are those of torch."""
    eye, scheme = torch.eye(300, dtype=torch.int32), QuantScheme(8, -1)
    ties = torch.cat([torch.arange(-127, 127) + 0.5, torch.tensor([127.0, -127.0, 0.0, -0.0])])
    rows = [ties, ties.nextafter(ties + 1), ties.nextafter(ties - 1)]
    x = torch.stack([torch.nn.functional.pad(rows[i % 3] * size / (1 + i // 3), (0, 42)) for i in range(tokens)])
    packed = pack_rows(to_unsigned(eye, scheme), 8)
    y = ops.packed_linear(x, Packed(packed, torch.ones(300, 1), None, None, 8, 300, 8))
    assert torch.equal(y, fake_quantize_activation(x))


@pytest.mark.parametrize(
    ("bits", "symmetric", "dtype", "value"), every(2, BITS, SYMMETRIC, DTYPES, ("nan", "inf", "-inf")), ids=str
)
def test_a_token_that_is_not_finite_stays_so(isa, bits, symmetric, dtype, value):
    """No int8 code stands for NaN or an infinity: all results of that token are NaN, and those of others as before."""
    for in_features, group in ((256, 128), (172, -1), (80, 16)):
        packed, *_ = packed_layer(70, in_features, QuantScheme(bits, group, symmetric), dtype)
        layer = Packed(*packed, None, bits, in_features, 8)
        for tokens in (1, 5, 40):
            x = torch.randn(tokens, in_features).to(dtype)
            expected = ops.packed_linear(x, layer)
            for place in (0, in_features // 2, in_features - 1):
                spoiled = x.clone()
                spoiled[-1, place] = float(value)
                y = ops.packed_linear(spoiled, layer)
                assert y[-1].isnan().all()
                assert torch.equal(y[:-1], expected[:-1])
                assert ops.reference(spoiled, layer)[-1].isnan().all()


def test_scales_of_all_sizes(isa, bits, symmetric):
    """Zero, negative, and so small or large that a table of the codes' values leaves the usual exponents."""
    packed, codes, zero_point, _ = packed_layer(40, 256, QuantScheme(bits, 128, symmetric), torch.bfloat16)
    sizes = torch.tensor([0.0, -0.02, 2.0**-120, -(2.0**117), 2.0**-100], dtype=torch.bfloat16)
    scale = (packed[1].sign() * sizes.repeat(16).view(40, 2)).contiguous()
    w_hat = dequantize(codes, scale, zero_point, QuantScheme(bits, 128, symmetric)).double()
    float32, bfloat16 = (torch.float32, 0.0), (torch.bfloat16, 2.0**-8)
    for tokens, (dtype, rounding) in ((1, float32), (2, float32), (9, float32), (1, bfloat16), (4, bfloat16)):
        x = torch.randn(tokens, 256).to(dtype)
        y = ops.packed_linear(x, Packed(packed[0], scale, packed[2], None, bits, 256, None))
        exact = x.double() @ w_hat.T
        bound = 1e-5 * (x.double().abs() @ w_hat.abs().T) + rounding * exact.abs()
        assert ((y.double() - exact).abs() <= bound).all(), (tokens, dtype)


@pytest.mark.parametrize("size", [30.0, 1e4])
def test_an_outlier_that_no_weight_reads(isa, bits, symmetric, size):
    """However the activations are held: the largest must not cost the others their precision."""
    scheme = QuantScheme(bits, 128, symmetric)
    packed, codes, zero_point, _ = packed_layer(70, 256, scheme, torch.bfloat16)
    codes[:, 5] = 0 if zero_point is None else zero_point[:, 0]
    w_hat = dequantize(codes, packed[1], zero_point, scheme).double()
    for tokens in (1, 4):
        x = torch.randn(tokens, 256).bfloat16()
        x[:, 5] = size
        y = ops.packed_linear(
            x, Packed(pack_rows(to_unsigned(codes, scheme), bits), *packed[1:], None, bits, 256, None)
        )
        exact = x.double() @ w_hat.T
        assert (y.double() - exact).norm() <= 2 * (exact.bfloat16().double() - exact).norm(), tokens


def test_fuzzed_shapes(isa):
    generator = torch.Generator().manual_seed(0)

    def draw(*choices):
        return choices[torch.randint(len(choices), (), generator=generator)]

    for _ in range(40):
        group = draw(16, 32, 48, 64, 96, 128, 256, -1)
        in_features = draw(1, 2, 3, 7) * group if group > 0 else draw(1, 3, 31, 33, 127, 130, 515)
        shape = (draw(1, 2, 5, 31, 33, 65, 129), in_features, group)
        case = (
            shape,
            draw(2, 3, 4, 8),
            draw(True, False),
            torch.bfloat16,
            draw(*DTYPES),
            draw(None, 8),
            draw(1, 5, 9, 33),
        )
        if shape[0] * case[-1] >= 60:  # an error over few outputs is a matter of chance
            assert error_ratio(*case) <= 2, case
        else:
            assert error_ratio(*case) < 20, case


@pytest.mark.parametrize("tokens", [1, 5, 40])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_unaligned_pointers_and_poisoned_outputs(isa, bits, symmetric, tokens, act_bits):
    """A tensor of a memory-mapped file starts anywhere, and what was in the output before must not matter."""
    scheme = QuantScheme(bits, 32, symmetric)
    packed, *_ = packed_layer(37, 96, scheme, torch.bfloat16)
    x = torch.randn(tokens, 96, dtype=torch.bfloat16)
    expected = ops.packed_linear(x, Packed(*packed, None, bits, 96, act_bits))

    def shifted(tensor):
        if tensor is None:
            return None
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)
        return room.copy_(tensor)

    for _ in range(3):  # what the kernels keep between calls is freed as it grows, and handed out again
        torch.full((1 << 18,), float("nan"))
    y = ops.packed_linear(shifted(x), Packed(*map(shifted, packed), None, bits, 96, act_bits))
    assert torch.equal(y, expected)


@pytest.mark.parametrize("act_bits", [None, 8])
def test_scratch_of_another_layer_does_not_leak(isa, bits, act_bits):
    """A layer of NaN scales fills the kernels' memory; one whose groups end inside a vector must not see it."""
    wide, *_ = packed_layer(64, 512, QuantScheme(bits, 32), torch.float32)
    narrow, *_ = packed_layer(64, 64, QuantScheme(bits, 32), torch.float32)
    x = torch.randn(40, 512)
    ops.packed_linear(x, Packed(wide[0], torch.full_like(wide[1], float("nan")), None, None, bits, 512, act_bits))
    for tokens in (1, 40):
        y = ops.packed_linear(x[:tokens, :64].contiguous(), Packed(*narrow, None, bits, 64, act_bits))
        assert not y.isnan().any()


def test_no_tokens(isa):
    packed, *_ = packed_layer(7, 32, QuantScheme(4, 16))
    assert ops.packed_linear(torch.empty(2, 0, 32), Packed(*packed, None, 4, 32, 8)).shape == (2, 0, 7)


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("tokens", [1, 64])
def test_threads_do_not_change_the_result(isa, tokens, act_bits):
    packed, *_ = packed_layer(301, 256, QuantScheme(4, 128), torch.bfloat16)
    x = torch.randn(tokens, 256, dtype=torch.bfloat16)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(ops.packed_linear(x, Packed(*packed, None, 4, 256, act_bits)))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.fixture(scope="module")
def bundled():
    """The bundled model, packed, float32 activations, and 64 greedy tokens of the torch reference."""
    import llmqat
    from llmqat.models.loading import load_float
    from llmqat.models.patcher import convert

    model = load_float("llama", torch.float32)
    llmqat.prepare(model, QuantScheme(4, 128))
    convert(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "supports", lambda *_: False)
        return model, greedy(model)


def greedy(model):
    prompt = torch.tensor([[1, 290, 17, 400]])
    return model.generate(prompt, max_new_tokens=64, min_new_tokens=64, do_sample=False)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_the_reference(isa, bundled):
    model, expected = bundled
    assert torch.equal(greedy(model), expected)


@pytest.mark.parametrize("act_bits", [None, 8])
def test_scales_below_the_normal_numbers_of_float16(isa, bits, symmetric, act_bits):
    """Those of small weights: processors differ in what they make of them."""
    packed, *_ = packed_layer(33, 64, QuantScheme(bits, 16, symmetric), torch.float16)
    scale = (packed[1].float() * 1e-5).half()
    assert scale.abs().max() < torch.finfo(torch.float16).smallest_normal
    layer = Packed(packed[0], scale, packed[2], None, bits, 64, act_bits)
    for dtype in DTYPES:
        x = torch.randn(5, 64).to(dtype)
        expected = ops.reference(x, layer).double()
        error = (ops.packed_linear(x, layer).double() - expected).norm() / expected.norm()
        assert error <= 4 * torch.finfo(dtype).eps, dtype
