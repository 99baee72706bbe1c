import warnings

import pytest
import torch

from llmqat.algorithms import gptq as module
from llmqat.algorithms.gptq import LATENT_MARGIN, gptq, inverse_cholesky, search_scale
from llmqat.errors import LlmqatError
from llmqat.quant.affine import choose_scale, dequantize, grouped, quantize
from llmqat.scheme import QuantScheme
from tests.narrow_products import narrow_products

COLUMNS = 96


def problem(columns=COLUMNS, rows=40, outlier=8.0, tokens=600):
    """A weight, and the Hessian of correlated inputs with a few outlier channels."""
    shared = torch.randn(tokens, 12) @ torch.randn(12, columns)
    X = torch.randn(tokens, columns) + 0.7 * shared
    X[:, 5::31] *= outlier
    return torch.randn(rows, columns), 2 / tokens * X.T @ X


def loss(weight, w_hat, H):
    """``||(W - W_hat) X||^2``, up to a factor."""
    d = (weight - w_hat.float()).double()
    return ((d @ H.double()) * d).sum()


def rtn(weight, scheme, dtype, scale=None, zero_point=None):
    if scale is None:
        scale, zero_point = choose_scale(weight, scheme, dtype)
    return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme)


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_beats_round_to_nearest(bits, symmetric, dtype, group_size):
    scheme = QuantScheme(bits, group_size, symmetric)
    weight, H = problem()
    result = gptq(weight, H, scheme, dtype)
    error = loss(weight, dequantize(*result[:3], scheme), H)
    assert error < 0.6 * loss(weight, rtn(weight, scheme, dtype), H)
    same_grid = loss(weight, rtn(weight, scheme, dtype, result.scale, result.zero_point), H)
    assert error < 0.8 * same_grid, "the compensation helps, not the scale alone"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_latents_quantize_to_the_codes_and_stay_within_reach(scheme, dtype):
    weight, H = problem()
    codes, scale, zero_point, latent = gptq(weight, H, scheme, dtype)
    assert scale.dtype == dtype
    assert torch.equal(codes, codes.round().clamp(scheme.qmin, scheme.qmax))
    assert torch.equal(quantize(latent, scale, zero_point, scheme).float(), codes)
    z = 0 if zero_point is None else zero_point.unsqueeze(-1)
    v = grouped(latent, scheme) / scale.float().unsqueeze(-1) + z
    assert v.min() >= scheme.qmin - LATENT_MARGIN - 1e-4
    assert v.max() <= scheme.qmax + LATENT_MARGIN + 1e-4
    assert (v - v.round()).abs().max() > 0.3, "latents hold the fraction that training starts from"


def naive(weight, H, scale, zero_point, scheme, damp=0.01):
    """The paper's algorithm without blocks, in float64: invert, quantize a column, eliminate it, repeat."""
    W, H = weight.double().clone(), H.double() + damp * H.diagonal().mean().double() * torch.eye(len(H))
    codes, left = torch.empty_like(W), H.diagonal().argsort(descending=True).tolist()
    Hinv = torch.linalg.inv(H[left][:, left])
    length = scheme.group_length(W.shape[1])
    for i, c in enumerate(left):
        s, z = scale[:, c // length].double(), 0 if zero_point is None else zero_point[:, c // length].double()
        codes[:, c] = ((W[:, c] / s).round() + z).clamp(scheme.qmin, scheme.qmax)
        error = (W[:, c] - (codes[:, c] - z) * s) / Hinv[i, i]
        W[:, left[i:]] -= error[:, None] * Hinv[i, i:]
        Hinv = Hinv - Hinv[:, i : i + 1] * Hinv[i : i + 1, :] / Hinv[i, i]
    return codes


@pytest.mark.parametrize("block", [7, 128])
def test_equals_the_algorithm_step_by_step(symmetric, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_COLUMNS", block)
    scheme = QuantScheme(4, 16, symmetric)
    weight, H = problem()
    result = gptq(weight, H, scheme, torch.float32)
    expected = naive(weight, H, result.scale, result.zero_point, scheme)
    assert (result.codes == expected).float().mean() > 0.999, "but for ties within float32 rounding"


def test_nothing_to_compensate_without_correlation(scheme):
    weight = torch.randn(24, COLUMNS)
    result = gptq(weight, torch.diag(torch.rand(COLUMNS) + 0.1), scheme, torch.bfloat16)
    assert torch.equal(result.codes, quantize(weight, result.scale, result.zero_point, scheme).float())


def with_dead_columns():
    weight, H = problem()
    dead = torch.zeros(COLUMNS, dtype=torch.bool)
    dead[[0, 17, 18, 95]] = True
    H[dead], H[:, dead] = 0, 0
    return weight, H, dead


def test_columns_never_excited_keep_their_round_to_nearest_code(scheme):
    weight, H, dead = with_dead_columns()
    result = gptq(weight, H, scheme, torch.bfloat16)
    plain = quantize(weight, result.scale, result.zero_point, scheme).float()
    assert torch.equal(result.codes[:, dead], plain[:, dead])
    assert not torch.equal(result.codes, plain)
    nothing = gptq(weight, torch.zeros_like(H), scheme, torch.bfloat16)
    assert torch.equal(nothing.codes, quantize(weight, nothing.scale, nothing.zero_point, scheme).float())


@pytest.mark.parametrize("exponent", [-24, 12])
@pytest.mark.parametrize("dead", [False, True])
def test_the_unit_of_the_inputs_does_not_matter(symmetric, exponent, dead):
    """Also with dead columns: what stands in for their zero must not drown the damping of the others."""
    scheme = QuantScheme(4, 16, symmetric)
    weight, H, _ = with_dead_columns() if dead else (*problem(), None)
    assert torch.equal(
        gptq(weight, H * 2.0**exponent, scheme, torch.float32).codes, gptq(weight, H, scheme, torch.float32).codes
    )


def test_scale_search_weighs_columns(scheme):
    weight, importance = torch.randn(32, COLUMNS), torch.ones(COLUMNS)
    importance[::16] = 50.0

    def error(scale, zero_point):
        d = rtn(weight, scheme, torch.bfloat16, scale, zero_point).float() - weight
        return grouped(d.square() * importance, scheme).sum(-1)

    found, flat = (search_scale(weight, i, scheme, torch.bfloat16) for i in (importance, torch.ones(COLUMNS)))
    plain = choose_scale(weight, scheme, torch.bfloat16)
    assert found[0].dtype == torch.bfloat16
    assert (error(*found) <= error(*plain)).all()
    assert error(*found).sum() < min(error(*plain).sum(), error(*flat).sum())


def test_scale_search_by_rows_is_that_of_the_whole_weight(scheme, monkeypatch):
    weight, importance = torch.randn(32, COLUMNS), torch.rand(COLUMNS)
    weight[5] *= 1e-7  # its scale is kept off zero by the largest entry of the whole weight
    expected = search_scale(weight, importance, scheme, torch.float32)
    monkeypatch.setattr("llmqat.quant.grid.CHUNK_ELEMENTS", 3 * COLUMNS)
    found = search_scale(weight, importance, scheme, torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if a is not None)


@pytest.mark.parametrize("damp", [0.01, 0.5])
def test_damping_and_factor(damp):
    _, H = problem()
    U = inverse_cholesky(H, damp, "layer").double()
    assert torch.equal(U, U.triu())
    damped = H.double() + damp * H.double().diagonal().mean() * torch.eye(COLUMNS)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(COLUMNS).double(), atol=1e-3, rtol=0)


def test_damping_is_raised_until_the_hessian_can_be_inverted():
    H = torch.tensor([[1.0, 1.05], [1.05, 1.0]])  # eigenvalues 2.05 and -0.05
    with pytest.warns(UserWarning, match=r"Hessian of block 3 down_proj is not positive .* raised to 0\.1"):
        U = inverse_cholesky(H, 0.01, "block 3 down_proj")
    torch.testing.assert_close(U.T @ U, torch.linalg.inv(H + 0.1 * torch.eye(2)))
    with pytest.warns(UserWarning, match=r"damping raised to 0\.01"), warnings.catch_warnings():
        inverse_cholesky(torch.ones(2, 2) - 1e-3 * torch.eye(2), 0.0, "layer")


def test_a_rank_deficient_hessian_needs_no_warning():
    weight, H = problem(tokens=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gptq(weight, H, QuantScheme(4, 16), torch.float32).codes.isfinite().all()


def test_a_hopeless_hessian_names_the_layer_and_the_remedy():
    H = torch.tensor([[1.0, 10.0], [10.0, 1.0]])
    message = r"cannot invert the Hessian of block 1 q_proj, even at damping 1; give it more .*--calibration-samples"
    with pytest.warns(UserWarning, match="damping raised to 1"), pytest.raises(LlmqatError, match=message):
        gptq(torch.randn(3, 2), H, QuantScheme(4, -1), torch.float32, layer="block 1 q_proj")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_inputs_are_named(value):
    weight, H = problem()
    H[3, 4] = value
    with pytest.raises(LlmqatError, match="calibration inputs of block 0 o_proj hold NaN or infinity; check the float"):
        gptq(weight, H, QuantScheme(4, 16), torch.float32, layer="block 0 o_proj")


def test_a_latent_that_would_round_elsewhere_goes_to_the_middle_of_its_code(symmetric):
    scheme = QuantScheme(4, 2, symmetric)
    codes, scale = torch.tensor([[3.0, 5.0]]), torch.tensor([[-0.5]])
    zero_point = None if symmetric else torch.tensor([[2.0]])
    middle = dequantize(codes, scale, zero_point, scheme)
    latent = middle + torch.tensor([[0.2, 0.3]])  # 0.4 and 0.6 of a code away
    anchored = module._anchor(latent, codes, scale, zero_point, scheme)
    torch.testing.assert_close(anchored, torch.stack([latent[:, 0], middle[:, 1]], 1))


def test_a_weight_that_is_not_finite_is_refused():
    weight = torch.randn(4, 32)
    weight[1, 2] = float("nan")
    with pytest.raises(LlmqatError, match="the weight of block 0 q_proj holds NaN or infinity"):
        gptq(weight, torch.eye(32), QuantScheme(4, 16), torch.float32, layer="block 0 q_proj")


def test_products_are_those_of_float32(monkeypatch):
    monkeypatch.setattr(module, "BLOCK_COLUMNS", 32)
    weight, H = problem()
    expected = gptq(weight, H, QuantScheme(4, 16), torch.bfloat16)
    with narrow_products():
        found = gptq(weight, H, QuantScheme(4, 16), torch.bfloat16)
    assert torch.equal(found.latent, expected.latent)
