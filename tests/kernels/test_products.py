"""Products of bfloat16 in tiles against float64, and the layer made of them."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import products, training
from llmqat.kernels.products import add_product, in_tiles, linear, multiply
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.scheme import QuantScheme

# (m, k, n): whole tiles, tails in every direction, several parts of a sum, several tasks.
SHAPES = [(16, 16, 16), (32, 64, 32), (17, 33, 19), (100, 70, 200), (70, 1200, 90), (1050, 48, 40), (33, 577, 330)]

needs_tiles = pytest.mark.skipif(not products.has_tiles(), reason="tiles of bfloat16 need AMX")


def matrix(rows: int, columns: int, across: bool) -> torch.Tensor:
    """Random values, inside larger ones so that what lies behind the end is not zero; or such a view, transposed."""
    if across:
        return matrix(columns, rows, False).T
    return torch.randn(rows + 1, columns + 8).bfloat16()[:rows, :columns]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


@needs_tiles
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("across_a", "across_b"), [(False, False), (False, True), (True, False), (True, True)])
def test_error_is_that_of_torch(shape, across_a, across_b):
    m, k, n = shape
    a, b, bias = matrix(m, k, across_a), matrix(k, n, across_b), torch.randn(n)
    assert in_tiles(a, b)
    exact = a.double() @ b.double()
    assert error(multiply(a, b), exact) <= 1.5 * error(a @ b, exact)
    assert error(multiply(a, b, dtype=torch.float32), exact) < 1e-6
    assert error(multiply(a, b, bias), exact + bias.double()) <= 1.5 * error(a @ b, exact)
    total = torch.randn(m, n)
    exact += total.double()
    add_product(total, a, b)
    assert error(total, exact) < 1e-6


@needs_tiles
def test_result_repeats_with_any_number_of_threads():
    a, b, threads = matrix(300, 1300, True), matrix(1300, 500, False), torch.get_num_threads()
    first = multiply(a, b)
    try:
        for count in (1, 2, 3, 64):
            torch.set_num_threads(count)
            assert torch.equal(multiply(a, b), first)
    finally:
        torch.set_num_threads(threads)


@needs_tiles
def test_values_that_are_not_finite_stay_in_their_row_and_column():
    a, b = matrix(40, 70, False), matrix(70, 50, True)
    a[3, 69], b[5, 7] = torch.inf, torch.nan
    finite = torch.isfinite(multiply(a, b))
    expected = torch.ones(40, 50, dtype=torch.bool)
    expected[3], expected[:, 7] = False, False
    assert torch.equal(finite, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_other_dtypes_are_left_to_torch(dtype):
    a, b = torch.randn(32, 64).to(dtype), torch.randn(64, 32).to(dtype)
    assert not in_tiles(a, b)
    assert torch.equal(multiply(a, b), a @ b)


def test_tensors_without_values_are_left_to_torch():
    with torch.device("meta"):
        a, b = torch.empty(32, 64, dtype=torch.bfloat16), torch.empty(64, 32, dtype=torch.bfloat16)
    assert multiply(a, b).shape == (32, 32)


def test_switch_leaves_products_to_torch(monkeypatch):
    monkeypatch.setenv(training.SWITCH, "torch")
    assert not in_tiles(*[torch.zeros(32, 32, dtype=torch.bfloat16)] * 2)
    monkeypatch.setenv(training.SWITCH, "native")
    with pytest.raises(LlmqatError, match="LLMQAT_TRAINING=native is not known; set it to torch, or leave it unset"):
        in_tiles(*[torch.zeros(32, 32, dtype=torch.bfloat16)] * 2)


@needs_tiles
@pytest.mark.parametrize("shape", [(40, 72), (2, 20, 72)], ids=str)
def test_gradients_are_those_of_a_linear_layer(shape):
    x, weight, bias = torch.randn(shape).bfloat16(), torch.randn(48, 72).bfloat16(), torch.randn(48).bfloat16()
    grad, found, exact = torch.randn(*shape[:-1], 48).bfloat16(), [], []
    for function, dtype, results in (
        (linear, torch.bfloat16, found),
        (torch.nn.functional.linear, torch.float64, exact),
    ):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in (x, weight, bias)]
        y = function(*leaves)
        results += [y, *torch.autograd.grad(y, leaves, grad.to(dtype))]
    assert [tensor.dtype for tensor in found] == [torch.bfloat16] * 4
    for ours, theirs in zip(found, exact, strict=True):
        assert ours.shape == theirs.shape
        assert error(ours, theirs) < 4e-3


def test_outputs_of_a_layer_may_be_written_to():
    """Some families scale queries in place, which torch forbids for views that an autograd function made."""
    layer = FakeQuantLinear.from_linear(torch.nn.Linear(64, 32), QuantScheme(4, 32), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(2, 20, 64))
        y.mul_(2).sum().backward()
    assert layer.weight.grad is not None
