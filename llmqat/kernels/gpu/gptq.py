"""GPTQ in two kernels: the search for the scale of a group, and the walk along the columns of a block.

The formulas are those of `llmqat.algorithms.gptq`; arXiv 2210.17323, algorithm 1. The search reads a weight once where
a group fits into registers, 4 bytes, and tries all candidates there; the walk reads the weight of a block and writes it
changed, with codes and errors, 16 bytes a weight. What a block does to the columns behind it is left to one product of
matrices.

Scales are bit for bit those of `llmqat.quant.affine.Ranges.scale`. Which candidate errs least is decided by sums whose
order is fixed by the tile: a run repeats, and may choose otherwise than torch where two errors are equal but for the
rounding of the sum.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmqat.kernels.gpu.launch import on
from llmqat.kernels.gpu.numerics import EXACT, TRITON_DTYPES, clamp, quotient, round_half_even, rounded_to
from llmqat.kernels.gpu.tiles import COLUMNS_IN_ORDER, Tile, power_of_two, search_tile
from llmqat.quant.affine import ranges_of, smallest_scale
from llmqat.quant.grid import Grid
from llmqat.scheme import QuantScheme


def takes(weight: Tensor, storage_dtype: torch.dtype) -> bool:
    """Whether the kernels know the dtypes of a weight and of its scales: all but float64."""
    return {weight.dtype, storage_dtype} <= TRITON_DTYPES.keys()


@torch.no_grad()
def search_scale(
    weight: Tensor,
    importance: Tensor,
    scheme: QuantScheme,
    storage_dtype: torch.dtype,
    candidates: Sequence[tuple[float, bool]],
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of the least weighted error in each group, by one launch behind the search for its range.

    Args:
        weight: ``(out, in)``, of which `takes` holds.
        importance: ``(in,)``, non-negative.
        scheme: the grid.
        storage_dtype: dtype in which scales are stored.
        candidates: by how much the range is shrunken, and whether its sign is flipped; the first counts where errors
            are equal, and where none is finite.
        tile: of a program; None for that of the table.
    """
    weight, ranges, (rows, columns) = weight.detach().contiguous(), ranges_of(weight, scheme), weight.shape
    group = scheme.group_length(columns)
    tile = tile or search_tile(group)
    ends = [
        (-shrink if flip else shrink) / scheme.qmin if scheme.symmetric else shrink / scheme.qmax
        for shrink, flip in candidates
    ]
    tables = torch.tensor([ends, [-shrink for shrink, _ in candidates]], dtype=torch.float32, device=weight.device)
    scale = torch.empty(ranges.low.shape, dtype=storage_dtype, device=weight.device)
    found = _Found(scale, None if scheme.symmetric else torch.empty_like(ranges.low))
    constants = _SearchConstants.of(scheme, storage_dtype, (columns, group, len(candidates)), tile)
    programs = columns // group, triton.cdiv(rows, tile.rows)
    with on(weight.device):
        _search[programs](
            weight,
            importance.float().contiguous(),
            ranges,
            tables,
            found,
            rows,
            constants,
            num_warps=tile.warps,
            **EXACT,
        )
    return found.scale, found.zero_point


@torch.no_grad()
def quantize_block(
    latent: Tensor, codes: Tensor, U: Tensor, group: Tensor, grid: Grid, tile: Tile | None = None
) -> Tensor:
    """Quantize the columns of a block one after the other, each error spread over the columns behind it, by one launch.

    Args:
        latent: ``(block, out)`` float32, contiguous; it becomes the weight of each column just before it is rounded.
        codes: ``(block, out)`` float32, contiguous; they are written.
        U: of the block, ``(block, block)`` float32, upper triangular.
        group: of each column, ``(block,)``.
        grid: of the weight, its scales in the storage dtype, of which `takes` holds; zero points are integers.
        tile: of a program, as wide as the block or wider; None for that of the table.

    Returns:
        ``(w - w_hat) / U[j, j]`` of each column j, ``(block, out)``.
    """
    assert latent.is_contiguous()
    assert codes.is_contiguous()
    errors, (columns, rows) = torch.empty_like(latent), latent.shape
    tile = tile or COLUMNS_IN_ORDER._replace(width=power_of_two(columns))
    found = _Found(grid.scale.contiguous(), None if grid.zero_point is None else grid.zero_point.contiguous())
    constants = _WalkConstants(
        grid.scale.shape[1], grid.scheme.qmin, grid.scheme.qmax, TRITON_DTYPES[grid.scale.dtype], tile.rows, tile.width
    )
    with on(latent.device):
        _walk[triton.cdiv(rows, tile.rows),](
            _Block(latent, codes, errors, U.contiguous(), group),
            found,
            columns,
            rows,
            constants,
            num_warps=tile.warps,
            **EXACT,
        )
    return errors


class _Found(NamedTuple):
    """Scales and zero points, ``(out, groups)``."""

    scale: Tensor
    zero_point: Tensor | None


class _SearchConstants(NamedTuple):
    """Numbers and dtypes for each set of which the search is compiled.

    The last three are of the dtype whose numbers scales must be: its least and largest, and where its numbers start to
    lie further apart than their size asks for, 0 if nowhere.
    """

    columns: int
    group: int
    candidates: int
    qmin: int
    qmax: int
    numbers: Any
    stored: Any
    rows: int
    width: int
    least: float
    largest: float
    normal: float

    @classmethod
    def of(
        cls, scheme: QuantScheme, storage_dtype: torch.dtype, sizes: tuple[int, int, int], tile: Tile
    ) -> "_SearchConstants":
        """The constants of a scheme; `sizes` are the first three."""
        numbers = storage_dtype if scheme.scale_dtype is None else getattr(torch, scheme.scale_dtype)
        info, least = torch.finfo(numbers), smallest_scale(numbers)
        normal = info.smallest_normal if least < info.smallest_normal else 0.0
        dtypes = TRITON_DTYPES[numbers], TRITON_DTYPES[storage_dtype]
        return cls(*sizes, scheme.qmin, scheme.qmax, *dtypes, tile.rows, tile.width, least, info.max, normal)


class _WalkConstants(NamedTuple):
    """Numbers and dtypes for each set of which the walk is compiled."""

    groups: int
    qmin: int
    qmax: int
    stored: Any
    rows: int
    width: int


class _Block(NamedTuple):
    """Matrices ``(block, out)`` that the walk reads and writes, and what it knows of their columns."""

    latent: Tensor
    codes: Tensor
    errors: Tensor
    U: Tensor
    group: Tensor


@triton.jit
def _search(weight, importance, ranges, tables, found, rows, C: tl.constexpr):
    """Write scale and zero point of the best candidate for some rows of one group."""
    group, row = tl.program_id(0), tl.program_id(1) * C.rows + tl.arange(0, C.rows)
    there, of_grid = row < rows, row * (C.columns // C.group) + group
    low, floor = tl.load(ranges.low + of_grid, there, other=0.0), tl.load(ranges.floor)
    extent = low
    if ranges.high is not None:
        extent = tl.load(ranges.high + of_grid, there, other=0.0) - low
    best_s, best_z = _candidate(extent, low, floor, tables, 0, ranges.high is None, C)
    best = tl.full([C.rows], float("inf"), tl.float32)
    w, weighed = _part(weight, importance, row, group, 0, there, C)
    for index in range(C.candidates):
        s, z = _candidate(extent, low, floor, tables, index, ranges.high is None, C)
        error = _error(w, weighed, s, z, C)
        for start in range(C.width, C.group, C.width):
            further, weighed_further = _part(weight, importance, row, group, start, there, C)
            error += _error(further, weighed_further, s, z, C)
        better = error < best
        best = tl.where(better, error, best)
        best_s, best_z = tl.where(better, s, best_s), tl.where(better, z, best_z)
    tl.store(found.scale + of_grid, best_s.to(found.scale.dtype.element_ty), there)
    if found.zero_point is not None:
        tl.store(found.zero_point + of_grid, best_z, there)


@triton.jit
def _candidate(extent, low, floor, tables, index, SYMMETRIC: tl.constexpr, C: tl.constexpr):
    """Scale and zero point of a range times a candidate's shrinking: `Ranges.scale`."""
    s = _stored(extent * tl.load(tables + index), floor, C)
    z = tl.zeros_like(s)
    if not SYMMETRIC:
        z = clamp(round_half_even(quotient(low * tl.load(tables + C.candidates + index), s)), C.qmin, C.qmax)
    return s, z


@triton.jit
def _stored(scale, floor, C: tl.constexpr):
    """The scale as a file holds it, away from zero: `llmqat.quant.affine.store_scale`."""
    magnitude = tl.abs(scale)
    magnitude = tl.where(magnitude < C.least, C.least, magnitude)
    magnitude = tl.where(magnitude < floor, floor, magnitude)
    if C.normal > 0:
        steps = magnitude * (1 / C.least)  # a power of two: nothing is rounded
        near = round_half_even(steps)
        up = tl.where(near < steps, near + 1, near)
        magnitude = tl.where(magnitude < C.normal, up * C.least, magnitude)
    signed = clamp(tl.where(scale < 0, -magnitude, magnitude), -C.largest, C.largest)
    return rounded_to(rounded_to(signed, C.numbers), C.stored)


@triton.jit
def _part(weight, importance, row, group, start, there, C: tl.constexpr):
    """A tile of a group from its column `start` on, and the importance of its columns; zeros outside."""
    within = start + tl.arange(0, C.width)
    column, inside = group * C.group + within, within < C.group
    place = row.to(tl.int64)[:, None] * C.columns + column[None, :]
    w = tl.load(weight + place, there[:, None] & inside[None, :], other=0.0).to(tl.float32)
    return w, tl.load(importance + column, inside, other=0.0)


@triton.jit
def _error(w, weighed, s, z, C: tl.constexpr):
    """``sum_j importance_j (w_j - w_hat_j)^2`` of each row of a tile."""
    d = _w_hat(_code(w, s[:, None], z[:, None], C), s[:, None], z[:, None], C) - w
    return tl.sum(d * d * weighed[None, :], 1)


@triton.jit
def _code(w, s, z, C: tl.constexpr):
    return clamp(round_half_even(quotient(w, s)) + z, C.qmin, C.qmax)


@triton.jit
def _w_hat(code, s, z, C: tl.constexpr):
    return rounded_to((code - z) * s, C.stored)


@triton.jit
def _walk(block, grid, columns, rows, C: tl.constexpr):
    """Quantize column after column of a block for some rows, which lie beside each other in memory."""
    column, row = tl.arange(0, C.width), tl.program_id(0) * C.rows + tl.arange(0, C.rows)
    there = row < rows
    place, inside = column.to(tl.int64)[:, None] * rows + row[None, :], (column < columns)[:, None] & there[None, :]
    latent = tl.load(block.latent + place, inside, other=0.0)
    for j in range(columns):
        w = tl.sum(tl.where((column == j)[:, None], latent, 0.0), 0)  # exact: all but one are zero
        of_grid = row * C.groups + tl.load(block.group + j).to(tl.int32)
        s, z = tl.load(grid.scale + of_grid, there, other=1.0).to(tl.float32), tl.zeros_like(w)
        if grid.zero_point is not None:
            z = tl.load(grid.zero_point + of_grid, there, other=0.0)
        code = _code(w, s, z, C)
        error = quotient(w - _w_hat(code, s, z, C), tl.load(block.U + j * columns + j))
        here = tl.cast(j, tl.int64) * rows + row
        tl.store(block.codes + here, code, there)
        tl.store(block.errors + here, error, there)
        behind = (column > j) & (column < columns)
        share = tl.load(block.U + j * columns + column, behind, other=0.0)
        latent = tl.where(behind[:, None], latent - share[:, None] * error[None, :], latent)
    tl.store(block.latent + place, latent, inside)
