"""Inputs of layers, keys and values on their int8 grids in one launch, bit for bit as `llmqat.quant.affine` finds them.

A dynamic grid is that of a token: a program takes whole rows, finds the largest magnitude of each, and then the codes,
for which it reads again, mostly from a cache, what did not fit into one tile. A static grid is one for the whole
tensor. Each number of the result is written once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmqat.kernels.gpu.launch import on
from llmqat.kernels.gpu.numerics import EXACT, clamp, nearest, quotient, round_half_even
from llmqat.kernels.gpu.tiles import Tile, rows_tile


class _Found(NamedTuple):
    """Places for what is made of each token; None for what is not wanted."""

    codes: Tensor | None = None
    scale: Tensor | None = None
    x_hat: Tensor | None = None


class _Width(NamedTuple):
    """Numbers for each set of which a kernel is compiled: columns of a row, rows and columns of a tile."""

    columns: int
    rows: int
    width: int


@torch.no_grad()
def quantize_activation(x: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Codes of each token, int8 and shaped like `x`, and scales ``(..., 1)`` float32."""
    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(*x.shape[:-1], 1, device=x.device)
    _launch(x, _Found(codes, scale), tile)
    return codes, scale


@torch.no_grad()
def fake_quantize_activation(x: Tensor, tile: Tile | None = None) -> Tensor:
    """`x` on the grid of each token, in its own dtype."""
    x_hat = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, _Found(x_hat=x_hat), tile)
    return x_hat


@torch.no_grad()
def fake_quantize_static(x: Tensor, scale: Tensor, tile: Tile | None = None) -> Tensor:
    """`x` on one grid for the whole tensor, in its own dtype; `scale` is ``(1,)``, on its device."""
    x, x_hat = x.contiguous(), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tile = tile or rows_tile(x.numel())
    width = tile.rows * tile.width
    with on(x.device):
        _static[(triton.cdiv(x.numel(), width),)](x, scale, x_hat, x.numel(), width, num_warps=tile.warps, **EXACT)
    return x_hat


def _launch(x: Tensor, found: _Found, tile: Tile | None) -> None:
    columns = x.shape[-1]
    tile, rows = tile or rows_tile(columns), x.numel() // columns
    with on(x.device):
        _dynamic[(triton.cdiv(rows, tile.rows),)](
            x.contiguous(), found, rows, _Width(columns, tile.rows, tile.width), num_warps=tile.warps, **EXACT
        )


@triton.jit
def _dynamic(x, found, rows, C: tl.constexpr):
    """Write whatever of `_Found` has a place, of some tokens."""
    row = tl.program_id(0) * C.rows + tl.arange(0, C.rows)
    there = row < rows
    largest = tl.full([C.rows], 0.0, tl.float32)
    for start in range(0, C.columns, C.width):
        place, inside = _places(row, start, there, C)
        size = tl.abs(tl.load(x + place, inside, other=0.0).to(tl.float32))
        # Not a maximum of NaN, which it drops.
        largest = tl.maximum(largest, tl.max(tl.where(size < float("inf"), size, float("inf")), 1))
    scale = tl.where(largest > 0, quotient(largest, tl.full([C.rows], 127.0, tl.float32)), 1.0)
    scale = tl.where(largest < float("inf"), scale, float("nan"))
    if found.scale is not None:
        tl.store(found.scale + row, scale, there)
    for start in range(0, C.columns, C.width):
        place, inside = _places(row, start, there, C)
        v = quotient(tl.load(x + place, inside, other=0.0).to(tl.float32), scale[:, None])
        # No code stands for NaN; nor for 0 / 0, of a token so small that its scale is zero.
        code = tl.where(v == v, clamp(round_half_even(v), -127.0, 127.0), 0.0)
        if found.codes is not None:
            tl.store(found.codes + place, code.to(tl.int32).to(tl.int8), inside)
        if found.x_hat is not None:
            dtype: tl.constexpr = found.x_hat.dtype.element_ty
            tl.store(found.x_hat + place, nearest(code * scale[:, None], dtype), inside)


@triton.jit
def _static(x, scale, x_hat, count, WIDTH: tl.constexpr):
    """Write numbers of a tensor as its grid has them."""
    place = tl.program_id(0).to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside, s = place < count, tl.load(scale).to(tl.float32)
    v = quotient(tl.load(x + place, inside, other=0.0).to(tl.float32), s)
    code = clamp(round_half_even(v), -128.0, 127.0)
    code = tl.where(code == 0, v * 0.0, code)  # a zero has the sign of what it was
    dtype: tl.constexpr = x_hat.dtype.element_ty
    tl.store(x_hat + place, nearest(code * s, dtype), inside)


@triton.jit
def _places(row, start, there, C: tl.constexpr):
    """Where columns of some rows lie from `start` on, and which of them are there, each ``(rows, width)``."""
    column = start + tl.arange(0, C.width)
    return row.to(tl.int64)[:, None] * C.columns + column[None, :], there[:, None] & (column < C.columns)[None, :]
