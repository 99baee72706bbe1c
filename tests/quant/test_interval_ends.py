import pytest
import torch

from llmqat.quant.affine import grouped
from llmqat.quant.fake_quant import codes_of
from llmqat.quant.grid import Grid, Latent
from llmqat.quant.interval_ends import away_from_ends
from llmqat.scheme import QuantScheme

ROWS, COLUMNS, GROUP = 24, 64, 32


def case(bits, symmetric, code_scale=False, storage_dtype=torch.bfloat16):
    """A weight and its grid: values beyond both ends, scales of either sign."""
    torch.manual_seed(bits)
    weight, shape = torch.randn(ROWS, COLUMNS), (ROWS, COLUMNS // GROUP)
    scale = (0.5 + torch.rand(shape)) * 3.5 / 2**bits
    if symmetric:
        scale = scale * torch.where(torch.rand(shape) < 0.5, -1, 1)
    zero_point = None if symmetric else torch.randint(1, 2**bits - 1, shape).float()
    scheme = QuantScheme(bits, GROUP, symmetric=symmetric)
    apart = scale * (1 + 0.1 * torch.rand(shape)) if code_scale else None
    return weight, Grid(scale, zero_point, apart, scheme, storage_dtype)


def to_neighbours(weight, grid):
    """How far each weight lies from the nearest code next to its own, in codes."""
    stored = grid.stored()
    scale = (stored.scale if stored.code_scale is None else stored.code_scale).float()[..., None]
    codes = codes_of(Latent(weight), grid).float()
    zero_point = 0 if grid.zero_point is None else grid.zero_point[..., None]
    offset = (grouped(weight, grid.scheme) / scale - (grouped(codes, grid.scheme) - zero_point)).flatten(-2)
    nothing = torch.tensor(torch.inf)
    above = torch.where(codes < grid.scheme.qmax, 0.5 - offset, nothing)
    below = torch.where(codes > grid.scheme.qmin, 0.5 + offset, nothing)
    return torch.minimum(above, below)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("code_scale", [True, False])
@pytest.mark.parametrize("storage_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_no_weight_is_left_at_an_end_and_no_code_changes(bits, symmetric, code_scale, storage_dtype):
    weight, grid = case(bits, symmetric, code_scale, storage_dtype)
    moved = away_from_ends(weight, grid, 0.05)
    assert torch.equal(codes_of(Latent(moved), grid), codes_of(Latent(weight), grid))
    before, after = to_neighbours(weight, grid), to_neighbours(moved, grid)
    assert (before < 0.04).any()
    assert (after > 0.05 - 1e-4).all()
    untouched = before > 0.05 + 1e-4
    assert untouched.any()
    assert torch.equal(moved[untouched], weight[untouched])


def test_weights_beyond_the_grid_stay():
    weight, grid = case(3, True)
    outside = (to_neighbours(weight, grid) > 0.51) & (codes_of(Latent(weight), grid).abs() >= 3)
    assert outside.any()
    assert torch.equal(away_from_ends(weight, grid, 0.1)[outside], weight[outside])


def test_the_weight_given_is_not_written_to():
    weight, grid = case(4, True)
    before = weight.clone()
    away_from_ends(weight, grid, 0.1)
    assert torch.equal(weight, before)
