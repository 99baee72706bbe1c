"""GPTQ as GPUs run it, by Triton's interpreter: scales, codes and latents of torch."""

from itertools import product

import pytest
import torch

from llmqat.algorithms import gptq as in_torch
from llmqat.algorithms.gptq import SHRINK_GRID, gptq
from llmqat.kernels.gpu import gptq as kernels
from llmqat.kernels.gpu import tiles
from llmqat.kernels.gpu.tiles import Tile
from llmqat.quant.affine import code_values, dequantize, grouped, ranges_of
from llmqat.quant.grid import Grid
from llmqat.scheme import QuantScheme

ROWS, COLUMNS = 37, 64
TALL = Tile(64, 64, 4)  # the interpreter takes its time for each program, not for its size
STORED = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _few_candidates(monkeypatch):
    monkeypatch.setattr(in_torch, "SHRINK_GRID", SHRINK_GRID[::6])


def weight_with_extremes() -> torch.Tensor:
    """Ordinary weights; a row of zeros, one of a single weight, and some that lie below float16's normal numbers."""
    weight = torch.randn(ROWS, COLUMNS) * torch.logspace(-6, 0, ROWS)[:, None]
    weight[0] = 0
    weight[1, 1:] = 0
    weight[2] = weight[2].abs()
    weight[3] = -weight[3].abs()
    weight[4] = torch.randint(-4, 4, (COLUMNS,)) / 4
    return weight


def candidates(scheme: QuantScheme) -> list[tuple[float, bool]]:
    return list(product(in_torch.SHRINK_GRID, (False, True) if scheme.symmetric else (False,)))


def errors_of(weight, importance, scheme, stored, shrink, flip):
    """Scale, zero point and error, in float64, of a candidate."""
    s, z = ranges_of(weight, scheme).scale(scheme, stored, shrink, flip)
    w_hat = dequantize(code_values(weight, s, z, scheme), s, z, scheme)
    return s, z, (grouped((w_hat.double() - weight).square() * importance, scheme)).sum(-1)


@pytest.mark.parametrize(
    ("scheme", "stored"),
    [
        (QuantScheme(2, 32), torch.bfloat16),
        (QuantScheme(3, -1, symmetric=False), torch.float16),
        (QuantScheme(4, -1, scale_dtype="float16"), torch.bfloat16),
        (QuantScheme(4, 32, symmetric=False), torch.bfloat16),
        (QuantScheme(8, 32, symmetric=False), torch.float32),
        (QuantScheme(8, -1), torch.float16),
    ],
    ids=str,
)
def test_scales_are_those_of_torch_wherever_errors_differ(scheme, stored):
    weight, importance = weight_with_extremes(), torch.rand(COLUMNS)
    scale, zero_point = kernels.search_scale(weight, importance, scheme, stored, candidates(scheme), TALL)
    right, right_zero = in_torch.search_scale(weight, importance, scheme, stored)
    assert scale.dtype == right.dtype
    tried = [errors_of(weight, importance, scheme, stored, *candidate) for candidate in candidates(scheme)]
    errors = torch.stack([error for *_, error in tried])
    least = errors.amin(0)
    of_right = torch.stack([torch.where(s == right, error, torch.inf) for s, _, error in tried]).amin(0)
    near = ((errors <= least * (1 + 1e-5)) & (errors != of_right)).any(0)  # the rounding of a sum may decide
    assert near.float().mean() < 0.1
    assert torch.equal(scale[~near], right[~near])
    of_found = torch.stack([torch.where(s == scale, error, torch.inf) for s, _, error in tried]).amin(0)
    assert (of_found <= least * (1 + 1e-5)).all(), "one of the candidates, and as good as the best"
    if zero_point is not None:
        assert torch.equal(zero_point[~near], right_zero[~near])
    clear = (~near).repeat_interleave(scheme.group_length(COLUMNS), 1)
    codes, right_codes = (code_values(weight, *grid, scheme) for grid in ((scale, zero_point), (right, right_zero)))
    assert torch.equal(codes[clear], right_codes[clear])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("number", [None, "float16"])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_every_candidate_has_the_scale_of_torch(symmetric, number, stored):
    scheme, weight = QuantScheme(4, -1, symmetric, scale_dtype=number), weight_with_extremes()
    for shrink, flip in ((0.75, symmetric), (SHRINK_GRID[-1], False)):
        found = kernels.search_scale(weight, torch.ones(COLUMNS), scheme, stored, [(shrink, flip)], TALL)
        right = ranges_of(weight, scheme).scale(scheme, stored, shrink, flip)
        assert torch.equal(found[0], right[0])
        assert symmetric or torch.equal(found[1], right[1])


@pytest.mark.filterwarnings("ignore:overflow")
def test_the_first_candidate_counts_where_no_error_is_finite():
    scheme, weight = QuantScheme(4, 32), torch.full((3, 32), 3e38)
    found, _ = kernels.search_scale(weight, torch.full((32,), 1e38), scheme, torch.bfloat16, candidates(scheme), TALL)
    assert torch.equal(found, ranges_of(weight, scheme).scale(scheme, torch.bfloat16)[0])


def problem(columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight of 24 rows, and the Hessian of correlated inputs, one of which is never seen."""
    X = torch.randn(600, columns) + torch.randn(600, 12) @ torch.randn(12, columns)
    X[:, 7] = 0
    return torch.randn(24, columns), 2 / 600 * X.T @ X


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Let GPTQ take the kernels, a program of which has all rows of these tests."""

    def switch():
        monkeypatch.setattr(in_torch, "runs_on", lambda device: True)
        monkeypatch.setattr(kernels, "search_tile", lambda group: TALL)
        monkeypatch.setattr(kernels, "COLUMNS_IN_ORDER", Tile(32, 128, 1))

    return switch


@pytest.mark.parametrize(
    ("scheme", "stored"),
    [
        (QuantScheme(4, 96), torch.bfloat16),
        (QuantScheme(3, 48, symmetric=False), torch.float16),
    ],
    ids=str,
)
def test_gptq_finds_what_it_finds_in_torch(scheme, stored, as_on_a_gpu):
    weight, H = problem(192)
    right = gptq(weight, H, scheme, stored)
    as_on_a_gpu()
    found = gptq(weight, H, scheme, stored)
    assert torch.equal(found.scale, right.scale)
    assert (found.zero_point is None) == scheme.symmetric
    assert scheme.symmetric or torch.equal(found.zero_point, right.zero_point)
    assert torch.equal(found.codes, right.codes)
    torch.testing.assert_close(found.latent, right.latent, rtol=0, atol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("stored", STORED, ids=str)
def test_a_block_is_that_of_torch_to_the_bit(symmetric, stored):
    scheme, columns, rows = QuantScheme(4, 8, symmetric), 24, 21
    weight = torch.randn(rows, 40)
    grid = Grid(*ranges_of(weight, scheme).scale(scheme, stored), None, scheme, stored)
    U, group = torch.randn(columns, columns).triu() + 3 * torch.eye(columns), torch.randint(0, 5, (columns,))
    latents = [weight[:, :columns].T.contiguous() for _ in range(2)]
    latents[0][:5, 0] = grid.scale[0, group[:5]].float() * torch.tensor([0.5, 2.5, -1.5, 20.5, 1e6])
    latents[1].copy_(latents[0])
    codes = [torch.full((columns, rows), torch.nan) for _ in range(2)]
    right = in_torch._quantize_block(latents[0], codes[0], U, group, grid)
    found = kernels.quantize_block(latents[1], codes[1], U, group, grid, Tile(32, 32, 1))
    assert torch.equal(found, right)
    assert torch.equal(*latents)
    assert torch.equal(*codes)


def test_the_tile_of_a_block_changes_nothing():
    scheme = QuantScheme(4, 8)
    weight, U, group = torch.randn(21, 12), torch.randn(12, 12).triu() + 3 * torch.eye(12), torch.arange(12) // 8
    grid = Grid(torch.rand(21, 2).bfloat16(), None, None, scheme, torch.bfloat16)
    found = []
    for tile in (None, Tile(8, 64, 2)):
        latent, codes = weight.T.contiguous(), torch.empty(12, 21)
        found.append((kernels.quantize_block(latent, codes, U, group, grid, tile), latent, codes))
    assert all(map(torch.equal, *found))


def test_parts_of_a_long_group_are_summed():
    scheme, weight, importance = QuantScheme(4, -1), torch.randn(9, 300), torch.rand(300)
    whole, parts = (
        kernels.search_scale(weight, importance, scheme, torch.bfloat16, candidates(scheme), Tile(16, width, 4))[0]
        for width in (512, 128)
    )
    assert torch.equal(whole, parts)
    assert tiles.search_tile(300).width < 300


def test_float64_is_left_to_torch(as_on_a_gpu):
    scheme, weight, importance = QuantScheme(4, 32), torch.randn(2, 64, dtype=torch.float64), torch.ones(64)
    right = in_torch.search_scale(weight, importance, scheme, torch.bfloat16)[0]
    as_on_a_gpu()
    assert torch.equal(in_torch.search_scale(weight, importance, scheme, torch.bfloat16)[0], right)
