"""Weights on their grid as GPUs find them, run by Triton's interpreter: the bits of torch, and its gradients."""

from itertools import product

import pytest
import torch
import triton
from packaging.version import Version

from llmqat.kernels.gpu import grid_rows
from llmqat.kernels.gpu.grid_rows import GridGradients, GridValues
from llmqat.kernels.gpu.tiles import Tile
from llmqat.quant import fake_quant
from llmqat.quant.affine import choose_scale
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.scheme import QuantScheme

ROWS, COLUMNS, RANK = 37, 96, 4
TALL = Tile(64, 32, 4)  # the interpreter takes its time for each program, not for its size


def weights(scheme: QuantScheme, stored: torch.dtype):
    """Latents of every make with their grids: ties, ends, values far out and NaN are among them."""
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(ROWS, COLUMNS) * 0.1
        scale, zero_point = choose_scale(weight, scheme, stored)
        weight[0, :9] = scale[0, 0].float() * torch.tensor([0.5, 2.5, -1.5, 7.5, -8.5, 1e6, -1e9, 0.0, torch.inf])
        weight[1, 0] = torch.nan
        scale = scale.float() * (1 + 0.01 * torch.randn(scale.shape))
        step = (torch.rand(scale.shape) * 1e-4).bfloat16()
        change = Compensation(torch.randint(-128, 128, weight.shape, dtype=torch.int8), step)
        # Numbers of few bits: their sums are exact in any order.
        adapters = Adapters(torch.randint(-8, 9, (RANK, COLUMNS)) / 64, torch.randint(-8, 9, (ROWS, RANK)) / 64, 0.5)
        zero_point = None if zero_point is None else zero_point + 0.3
        for latent in (Latent(weight.to(dtype)), Latent(weight.to(dtype), change, adapters)):
            for code_scale in (None, scale * 1.01):
                yield latent, Grid(scale, zero_point, code_scale, scheme, stored)


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether values are equal, NaN where NaN is."""
    return found.dtype == expected.dtype and torch.allclose(found, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 48, -1])
def test_latents_codes_and_w_hat_are_those_of_torch(bits, symmetric, group):
    scheme = QuantScheme(bits, group, symmetric)
    for stored, out_dtype in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.bfloat16)):
        for latent, grid in weights(scheme, stored):
            shape = latent.weight.shape
            clipped = torch.zeros((), dtype=torch.int64)
            codes = torch.empty(shape, dtype=torch.int8 if symmetric else torch.uint8)
            found = GridValues(torch.empty(shape), codes, torch.empty(shape, dtype=out_dtype), clipped)
            grid_rows.find(latent, grid, found, tile=TALL)
            assert same(found.latents, latent.rows(slice(None)))
            known = ~found.latents.isnan()  # no code stands for NaN
            assert torch.equal(codes[known], fake_quant.codes_of(latent, grid)[known])
            assert same(found.w_hat, fake_quant.fake_quantize(latent, grid, out_dtype))
            assert clipped == fake_quant.count_clipped(latent, grid)


@pytest.mark.skipif(Version(triton.__version__) < Version("3.9"), reason="the interpreter before rounds tl.fma twice")
def test_adapters_are_summed_in_the_order_of_torch():
    a, b = torch.randn(RANK, COLUMNS), torch.randn(ROWS, RANK)
    latent = Latent(torch.randn(ROWS, COLUMNS), None, Adapters(a, b, 0.3))
    scheme = QuantScheme(4, 32)
    grid = Grid(choose_scale(latent.weight, scheme, torch.float32)[0], None, None, scheme, torch.float32)
    found = GridValues(latents=torch.empty(ROWS, COLUMNS))
    grid_rows.find(latent, grid, found, tile=TALL)
    assert torch.equal(found.latents, latent.rows(slice(None)))


def test_rows_that_are_asked_for_are_those_of_the_whole():
    (latent, grid), *_ = weights(QuantScheme(4, 32), torch.bfloat16)
    ids = torch.tensor([3, 0, 36, 3])
    found = GridValues(w_hat=torch.empty(4, COLUMNS, dtype=torch.bfloat16))
    grid_rows.find(latent, grid, found, ids, TALL)
    assert same(found.w_hat, fake_quant.fake_quantize(latent, grid, torch.bfloat16)[ids])


@pytest.mark.parametrize(("bits", "symmetric", "group"), [(4, True, 32), (3, False, 48), (8, False, -1)])
@pytest.mark.parametrize("clip_mask", [False, True])
def test_gradients_are_those_of_torch(bits, symmetric, group, clip_mask):
    for latent, grid in weights(QuantScheme(bits, group, symmetric), torch.bfloat16):
        latent = latent._replace(weight=latent.weight.nan_to_num(0.1, 0.1).clamp(-1, 1))
        g = torch.randn(ROWS, COLUMNS)
        wide = latent.rows(slice(None)).double()
        expected = fake_quant.grid_gradients(g.double(), wide, grid.widened(torch.float64), clip_mask)
        found = GridGradients(
            torch.empty_like(grid.scale), torch.empty_like(grid.scale), torch.empty(ROWS, COLUMNS, dtype=torch.bfloat16)
        )
        grid_rows.grid_gradients(g, latent, grid, found, clip_mask, TALL)
        for one, right in zip((g, found.scale, found.zero_point), expected, strict=True):
            torch.testing.assert_close(one, right.float(), rtol=1e-5, atol=1e-4)
        assert same(found.w_hat, fake_quant.fake_quantize(latent, grid, torch.bfloat16))


def test_the_tile_changes_nothing():
    (latent, grid), *_ = weights(QuantScheme(4, 48), torch.bfloat16)
    whole = grid_rows.fake_quantize(latent, grid, torch.bfloat16)
    for rows, width in product((16, 128), (16, 64)):
        tile = Tile(rows, width, 4)
        assert same(grid_rows.fake_quantize(latent, grid, torch.bfloat16, tile), whole)
