"""Weights on their grid in one launch: ``W_hat``, codes, clipped weights, and the gradients of what makes them.

The formulas are those of `llmqat.quant.fake_quant`. A program takes some rows of one group, so that no sum of floats
crosses programs and a run repeats. Adapters are added in a fixed order of operations: for each ``k`` in turn one fused
multiply-add of ``scaling * b[row, k]``, ``a[k, column]`` and the sum so far.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmqat.kernels.gpu.launch import on
from llmqat.kernels.gpu.numerics import EXACT, TRITON_DTYPES, clamp, nearest, quotient, round_half_even, rounded_to
from llmqat.kernels.gpu.tiles import Tile, grid_tile
from llmqat.kernels.grid_rows import GridGradients
from llmqat.quant.grid import Grid, Latent


class GridValues(NamedTuple):
    """Places for what `find` makes; None for what is not wanted.

    Attributes:
        latents: ``(rows, in)`` float32.
        codes: ``(rows, in)``, int8 if symmetric, else uint8.
        w_hat: ``(rows, in)``.
        clipped: an int64 scalar, zero: how many latents lie more than half a code beyond the ends of the grid.
    """

    latents: Tensor | None = None
    codes: Tensor | None = None
    w_hat: Tensor | None = None
    clipped: Tensor | None = None


def takes(latent: Latent, grid: Grid, out_dtype: torch.dtype = torch.float32) -> bool:
    """Whether the kernels know the dtypes of a weight, of its grid and of ``W_hat``: all but float64."""
    return {latent.weight.dtype, grid.scale.dtype, grid.storage_dtype, out_dtype} <= TRITON_DTYPES.keys()


@torch.no_grad()
def find(latent: Latent, grid: Grid, wanted: GridValues, index: Tensor | None = None, tile: Tile | None = None) -> None:
    """Fill the tensors of `wanted` by one launch.

    Args:
        latent: the weight.
        grid: its grid, of which `takes` holds.
        wanted: where to write.
        index: rows of the weight ``(rows,)``; None for all.
        tile: of a program; None for that of the table.
    """
    call = _Call.of(latent, grid, None if wanted.w_hat is None else wanted.w_hat.dtype, tile)
    rows = len(latent.weight) if index is None else len(index)
    with on(latent.weight.device):
        _find[call.programs(rows)](*call.values, index, wanted, rows, call.constants, **call.options)


def fake_quantize(latent: Latent, grid: Grid, out_dtype: torch.dtype, tile: Tile | None = None) -> Tensor:
    """``W_hat`` ``(out, in)`` in `out_dtype`, as `llmqat.quant.fake_quant.fake_quantize` finds it."""
    w_hat = torch.empty(latent.weight.shape, dtype=out_dtype, device=latent.weight.device)
    find(latent, grid, GridValues(w_hat=w_hat), tile=tile)
    return w_hat


def codes_of(latent: Latent, grid: Grid) -> Tensor:
    """The codes of `fake_quantize`, ``(out, in)``: int8 for a symmetric scheme, else uint8."""
    dtype = torch.int8 if grid.scheme.symmetric else torch.uint8
    codes = torch.empty(latent.weight.shape, dtype=dtype, device=latent.weight.device)
    find(latent, grid, GridValues(codes=codes))
    return codes


def count_clipped(latent: Latent, grid: Grid) -> Tensor:
    """How many latents lie more than half a code beyond the ends of the grid, a scalar on their device."""
    count = torch.zeros((), dtype=torch.int64, device=latent.weight.device)
    find(latent, grid, GridValues(clipped=count))
    return count


def latents_of(latent: Latent, grid: Grid, index: Tensor | None = None) -> Tensor:
    """The sum that is quantized, ``(rows, in)`` float32: all rows, or those of an index."""
    rows = len(latent.weight) if index is None else len(index)
    latents = torch.empty(rows, latent.weight.shape[1], device=latent.weight.device)
    find(latent, grid, GridValues(latents=latents), index)
    return latents


@torch.no_grad()
def grid_gradients(
    g: Tensor, latent: Latent, grid: Grid, wanted: GridGradients, clip_mask: bool, tile: Tile | None = None
) -> None:
    """Fill the tensors of `wanted`, float32 and ``W_hat``, by one launch from the gradient of ``W_hat``.

    Args:
        g: gradient of ``W_hat``, ``(out, in)`` float32; it becomes that of the latents.
        latent: the weight.
        grid: its grid, of which `takes` holds.
        wanted: where to write.
        clip_mask: stop gradients of weights beyond the ends of the grid.
        tile: of a program; None for that of the table.
    """
    call, rows = _Call.of(latent, grid, None if wanted.w_hat is None else wanted.w_hat.dtype, tile), len(latent.weight)
    with on(latent.weight.device):
        _grid_gradients[call.programs(rows)](
            *call.values, g, wanted, rows, call.constants, MASK=clip_mask, **call.options
        )


class _Weight(NamedTuple):
    """The parts of a latent weight, contiguous, as the kernels read them."""

    weight: Tensor
    multiples: Tensor | None
    step: Tensor | None
    a: Tensor | None
    b: Tensor | None
    scaling: float


class _Scales(NamedTuple):
    """The tensors of a grid, contiguous."""

    scale: Tensor
    code_scale: Tensor | None
    zero_point: Tensor | None


class _Constants(NamedTuple):
    """Numbers and dtypes for each set of which a kernel is compiled; `numbers` are those that scales must be."""

    columns: int
    group: int
    rank: int
    qmin: int
    qmax: int
    numbers: Any
    stored: Any
    out: Any
    rows: int
    width: int


class _Call(NamedTuple):
    """The arguments that both kernels take of a weight and its grid."""

    values: tuple[_Weight, _Scales]
    constants: _Constants
    options: dict[str, Any]

    @classmethod
    def of(cls, latent: Latent, grid: Grid, out_dtype: torch.dtype | None, tile: Tile | None) -> "_Call":
        """The arguments of a weight."""
        change, adapters, scheme = latent.compensation, latent.own_adapters, grid.scheme
        multiples, step = (None, None) if change is None else map(_dense, change)
        a, b, scaling = (None, None, 1.0) if adapters is None else adapters
        weight = _Weight(_dense(latent.weight), multiples, step, _dense(a), _dense(b), float(scaling))
        scales = _Scales(_dense(grid.scale), _dense(grid.code_scale), _dense(grid.zero_point))
        columns, rank = latent.weight.shape[1], 0 if a is None else len(a)
        group = columns // grid.scale.shape[1]
        tile = tile or grid_tile(group, rank > 0)
        numbers = grid.storage_dtype if scheme.scale_dtype is None else getattr(torch, scheme.scale_dtype)
        constants = _Constants(
            *(columns, group, rank, scheme.qmin, scheme.qmax),
            numbers=TRITON_DTYPES[numbers],
            stored=TRITON_DTYPES[grid.storage_dtype],
            out=TRITON_DTYPES[out_dtype or torch.float32],
            rows=tile.rows,
            width=tile.width,
        )
        return cls((weight, scales), constants, {"num_warps": tile.warps, **EXACT})

    def programs(self, rows: int) -> tuple[int, int]:
        """Programs along groups, which lie beside each other in memory, and along rows."""
        return self.constants.columns // self.constants.group, triton.cdiv(rows, self.constants.rows)


def _dense(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.detach().contiguous()


@triton.jit
def _find(weight, scales, index, wanted, rows, C: tl.constexpr):
    """Write whatever of `GridValues` has a place, of the rows of a weight or of those that `index` names."""
    group, out = tl.program_id(0), tl.program_id(1) * C.rows + tl.arange(0, C.rows)
    there = out < rows
    row = out if index is None else tl.load(index + out, there, other=0).to(tl.int32)
    s, s0, z = _grid_of(scales, row * (C.columns // C.group) + group, there, C)
    outside = tl.full([C.rows], 0, tl.int32)
    for start in range(0, C.group, C.width):
        column, inside = _columns(group, start, there, C)
        latent = _latent(weight, row, group, column, inside, C)
        place = out.to(tl.int64)[:, None] * C.columns + column[None, :]
        v = quotient(latent, s0)
        q = clamp(round_half_even(v) + z, C.qmin, C.qmax)
        if wanted.latents is not None:
            tl.store(wanted.latents + place, latent, inside)
        if wanted.codes is not None:
            tl.store(wanted.codes + place, q.to(tl.int32).to(wanted.codes.dtype.element_ty), inside)
        if wanted.w_hat is not None:
            tl.store(wanted.w_hat + place, _w_hat(q - z, s, C), inside)
        if wanted.clipped is not None:
            beyond = (v + z < C.qmin - 0.5) | (v + z > C.qmax + 0.5)
            outside += tl.sum((beyond & inside).to(tl.int32), 1)
    if wanted.clipped is not None:
        tl.atomic_add(wanted.clipped, tl.sum(outside, 0).to(tl.int64))  # integers: their order changes nothing


@triton.jit
def _grid_gradients(weight, scales, g, wanted, rows, C: tl.constexpr, MASK: tl.constexpr):
    """Write whatever of `GridGradients` has a place; `g` becomes the gradient of the latents."""
    group, row = tl.program_id(0), tl.program_id(1) * C.rows + tl.arange(0, C.rows)
    there, of_grid = row < rows, row * (C.columns // C.group) + group
    s, s0, z = _grid_of(scales, of_grid, there, C)
    of_scale, of_zero = tl.full([C.rows], 0.0, tl.float32), tl.full([C.rows], 0.0, tl.float32)
    for start in range(0, C.group, C.width):
        column, inside = _columns(group, start, there, C)
        latent = _latent(weight, row, group, column, inside, C)
        place = row.to(tl.int64)[:, None] * C.columns + column[None, :]
        grad = tl.load(g + place, inside, other=0.0)
        v = quotient(latent, s0)
        u = round_half_even(v) + z
        q = clamp(u, C.qmin, C.qmax)
        kept = (u == q) if MASK else inside
        by_scale = q - z
        if scales.code_scale is None:
            by_scale -= tl.where(kept, v, 0.0)
        of_scale += tl.sum(tl.where(inside, grad * by_scale, 0.0), 1)
        of_zero += tl.sum(tl.where(kept, 0.0, grad), 1)
        grad = tl.where(kept, grad, 0.0)
        if scales.code_scale is not None:
            grad *= quotient(tl.broadcast_to(s, grad.shape), s0)
        if MASK or scales.code_scale is not None:
            tl.store(g + place, grad, inside)
        if wanted.w_hat is not None:
            tl.store(wanted.w_hat + place, _w_hat(q - z, s, C), inside)
    if wanted.scale is not None:
        tl.store(wanted.scale + of_grid, of_scale, there)
    if wanted.zero_point is not None:
        tl.store(wanted.zero_point + of_grid, -tl.reshape(s, [C.rows]) * of_zero, there)


@triton.jit
def _columns(group, start, there, C: tl.constexpr):
    """Columns of a group from `start` on, and where of them and the rows that are `there` the tile lies inside."""
    within = start + tl.arange(0, C.width)
    return group * C.group + within, there[:, None] & (within < C.group)[None, :]


@triton.jit
def _latent(weight, row, group, column, inside, C: tl.constexpr):
    """The sum that is quantized, a float32 tile: weight, then adapters, then compensation."""
    place = row.to(tl.int64)[:, None] * C.columns + column[None, :]
    total = tl.load(weight.weight + place, inside, other=0.0).to(tl.float32)
    if weight.a is not None:
        added = tl.zeros_like(total)
        for k in range(C.rank):
            b = tl.load(weight.b + (row * C.rank + k)[:, None], inside, other=0.0).to(tl.float32) * weight.scaling
            a = tl.load(weight.a + (k * C.columns + column)[None, :], inside, other=0.0).to(tl.float32)
            added = tl.fma(b, a, added)
        total += added
    if weight.multiples is not None:
        step = tl.load(weight.step + (row * (C.columns // C.group) + group)[:, None], inside, other=0.0).to(tl.float32)
        total += tl.load(weight.multiples + place, inside, other=0).to(tl.float32) * step
    return total


@triton.jit
def _grid_of(scales, place, there, C: tl.constexpr):
    """Scale as it is stored, scale that finds the codes, and zero point, each ``(rows, 1)`` in float32."""
    s = tl.load(scales.scale + place, there, other=1.0).to(tl.float32)
    s = rounded_to(rounded_to(s, C.numbers), C.stored)
    s0 = s
    if scales.code_scale is not None:
        s0 = tl.load(scales.code_scale + place, there, other=1.0).to(tl.float32)
    z = tl.zeros_like(s)
    if scales.zero_point is not None:
        z = clamp(round_half_even(tl.load(scales.zero_point + place, there, other=0.0).to(tl.float32)), C.qmin, C.qmax)
    return s[:, None], s0[:, None], z[:, None]


@triton.jit
def _w_hat(steps, s, C: tl.constexpr):
    """``s * steps`` rounded once to the dtype of the file, then to that of the product."""
    return nearest(rounded_to(steps * s, C.stored), C.out)
