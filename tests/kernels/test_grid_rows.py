"""Weights on their grid by the compiled kernels: the bits of torch, and its gradients of scales."""

import pytest
import torch

from llmqat.kernels import grid_rows, native, training
from llmqat.quant import fake_quant
from llmqat.quant.affine import choose_scale
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.scheme import QuantScheme
from tests.kernels.conftest import kernels

ROWS, COLUMNS, RANK = 37, 96, 8
STORED = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture
def of_isa(isa, monkeypatch):
    """Kernels of one instruction set, where training looks for them."""
    monkeypatch.setattr(training, "library", kernels)


def weights(scheme: QuantScheme, stored: torch.dtype):
    """Latents of every make, and grids with and without a code scale; zero points lie between integers."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(ROWS, COLUMNS) * 0.1).to(dtype)
        weight[0, :4] = torch.tensor([0.0, -0.0, 10.0, -10.0])
        scale, zero_point = choose_scale(weight.float(), scheme, stored)
        scale = scale.float() * (1 + 0.01 * torch.randn(scale.shape))
        step = (torch.rand(scale.shape) * 1e-4).bfloat16()
        change = Compensation(torch.randint(-128, 128, weight.shape, dtype=torch.int8), step)
        adapters = Adapters(torch.randn(RANK, COLUMNS) * 0.1, torch.randn(ROWS, RANK) * 0.1, 2.0)
        zero_point = None if zero_point is None else zero_point + 0.3
        for latent in (Latent(weight), Latent(weight, change), Latent(weight, change, adapters)):
            for code_scale in (None, scale * 1.01):
                yield latent, Grid(scale, zero_point, code_scale, scheme, stored)


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    integers = torch.int16 if found.dtype.itemsize == 2 else torch.int32
    return found.dtype == expected.dtype and torch.equal(found.view(integers), expected.view(integers))


@pytest.mark.parametrize("group", [16, 48, -1])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_w_hat_has_the_bits_of_torch(of_isa, bits, symmetric, group, stored):
    for latent, grid in weights(QuantScheme(bits, group, symmetric), stored):
        for dtype in (None, torch.bfloat16, torch.float32):
            expected = fake_quant.fake_quantize(latent, grid, dtype)
            assert same_bits(grid_rows.fake_quantize(latent, grid, dtype), expected)


@pytest.mark.parametrize("stored", STORED, ids=str)
def test_gradients_are_those_of_torch(of_isa, bits, symmetric, stored):
    g = torch.randn(ROWS, COLUMNS)
    for latent, grid in weights(QuantScheme(bits, 32, symmetric), stored):
        dw = g.clone()
        ds, _, w_hat = grid_rows.grid_gradients(dw, latent, grid, out_dtype=torch.bfloat16)
        assert same_bits(w_hat, fake_quant.fake_quantize(latent, grid, torch.bfloat16))
        wide = grid.widened(torch.float64)
        rows = latent.rows(slice(0, ROWS)).double()
        _, exact, _ = fake_quant.grid_gradients(g.double(), rows, wide, clip_mask=False)
        of_latent, theirs, _ = fake_quant.grid_gradients(g, rows.float(), grid.widened(torch.float32), clip_mask=False)
        assert same_bits(dw, of_latent)
        floor = 1e-7 * exact.norm()  # where torch is exact by chance
        assert (ds - exact).norm() <= 1.5 * (theirs - exact).norm() + floor


def test_ties_round_to_even(of_isa):
    weight = torch.arange(-8, 8).repeat(4).mul(0.5).view(4, 16)
    grid = Grid(torch.ones(4, 1), None, None, QuantScheme(4, 16), torch.float32)
    assert same_bits(grid_rows.fake_quantize(Latent(weight), grid), weight.round())


def test_not_finite_latents_are_those_of_torch(of_isa):
    weight = torch.randn(2, 32)
    weight[0, 0], weight[0, 1], weight[1, 2] = torch.nan, torch.inf, -torch.inf
    grid = Grid(torch.full((2, 2), 0.1), None, None, QuantScheme(4, 16), torch.bfloat16)
    found, expected = grid_rows.fake_quantize(Latent(weight), grid), fake_quant.fake_quantize(Latent(weight), grid)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_float64_is_left_to_torch():
    weight = torch.randn(4, 32, dtype=torch.float64)
    grid = Grid(torch.full((4, 2), 0.1), None, None, QuantScheme(4, 16), torch.float32)
    assert not grid_rows._on_cpu(Latent(weight), grid, torch.float32)
    assert not grid_rows._on_cpu(Latent(weight.float()), grid, torch.float64)
    assert torch.equal(grid_rows.fake_quantize(Latent(weight), grid), fake_quant.fake_quantize(Latent(weight), grid))


def test_sizes_that_do_not_fit_are_refused():
    if native.library() is None:
        pytest.skip("no compiled kernels")
    weight = torch.randn(4, 32)
    grid = Grid(torch.full((4, 3), 0.1), None, None, QuantScheme(4, 16), torch.float32)
    with pytest.raises(Exception, match="32 columns are no whole number of 3 groups"):
        grid_rows.fake_quantize(Latent(weight), grid)
