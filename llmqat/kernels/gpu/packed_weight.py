"""Packed weights on GPUs: codes, read as the file holds them, become ``W_hat`` in registers.

``W_hat = scale * (codes - zero_point)`` is rounded to the dtype of the scale and then to that of the product, bit for
bit as `llmqat.quant.affine.dequantize` and a cast make it.
"""

from math import gcd
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmqat.kernels.gpu.launch import on
from llmqat.kernels.gpu.numerics import EXACT, TRITON_DTYPES, nearest
from llmqat.kernels.gpu.tiles import Tile, product_tile
from llmqat.kernels.packed import Packed

# What is decoded together: the codes of a word; of 3 bits those of a word and a half.
CODES_OF_UNIT = {2: 16, 3: 16, 4: 8, 8: 4}

# 2^23: its float32 ends in the bits of an integer below it, if they are put there.
_INTEGERS = tl.constexpr(8388608.0)
_INTEGER_BITS = tl.constexpr(0x4B000000)


def has_whole_units(packed: Packed) -> bool:
    """Whether no unit of codes has more than one scale: groups of a multiple of 16, or whole rows.

    A scale for each code costs as much as the product; layers with others are dequantized.
    """
    groups = packed.scale.shape[1]
    return groups == 1 or packed.in_features // groups % CODES_OF_UNIT[packed.bits] == 0


def dequantize(
    packed: Packed, dtype: torch.dtype, rows: slice | Tensor = slice(None), tile: Tile | None = None
) -> Tensor:
    """Rows of ``W_hat`` ``(rows, in)``, rounded to the dtype of the scale and then to `dtype`, by one launch.

    Args:
        packed: the layer.
        dtype: of the result.
        rows: some of them, as a slice without a step or as numbers ``(n,)`` of rows that there are.
        tile: of a program; None for that of the table.
    """
    index, first, count = None, 0, 0
    if isinstance(rows, slice):
        first, end, _ = rows.indices(packed.codes.shape[0])
        count = end - first
    else:
        index, count = rows.contiguous(), len(rows)
    tile = tile or product_tile(packed.bits, packed.in_features, together=False)
    w_hat = torch.empty(count, packed.in_features, dtype=dtype, device=packed.codes.device)
    if count:
        constants = Constants.of(packed, dtype, tile, 1, 1)
        programs = triton.cdiv(count, tile.rows), triton.cdiv(packed.in_features, tile.width)
        with on(w_hat.device):
            _dequantize[programs](
                Weight.of(packed), index, w_hat, first, count, constants, num_warps=tile.warps, **EXACT
            )
    return w_hat


class Weight(NamedTuple):
    """The tensors of a packed layer, contiguous."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None

    @classmethod
    def of(cls, packed: Packed) -> "Weight":
        """The tensors of a layer, copied where they have gaps."""
        return cls(*(None if tensor is None else tensor.detach().contiguous() for tensor in packed[:4]))  # type: ignore[arg-type]


class Constants(NamedTuple):
    """Numbers and dtypes for each set of which a kernel is compiled.

    Attributes:
        columns: of the weight.
        words: that hold the codes of a row.
        zero_words: that hold the zero points of a group.
        groups: of a row.
        group: weights in a group.
        bits: of a code.
        per_unit: codes of a unit.
        stored: dtype of the scale.
        out: dtype of ``W_hat`` and of `x`.
        rows: of a tile.
        runs: of units beside each other in a tile that share a scale.
        units: of a run.
        tokens: of a tile.
        steps: tiles that a program takes along its columns.
    """

    columns: int
    words: int
    zero_words: int
    groups: int
    group: int
    bits: int
    per_unit: int
    stored: Any
    out: Any
    rows: int
    runs: int
    units: int
    tokens: int
    steps: int

    @classmethod
    def of(cls, packed: Packed, dtype: torch.dtype, tile: Tile, tokens: int, steps: int) -> "Constants":
        """The numbers of a layer and of the tiles of a product in `dtype`."""
        groups, per_unit = packed.scale.shape[1], CODES_OF_UNIT[packed.bits]
        zero_words = 0 if packed.zero_point is None else packed.zero_point.shape[0]
        group, units = packed.in_features // groups, tile.width // per_unit
        of_run = units if groups == 1 else gcd(units, group // per_unit) if has_whole_units(packed) else 1
        return cls(
            packed.in_features,
            packed.codes.shape[1],
            zero_words,
            groups,
            group,
            packed.bits,
            per_unit,
            TRITON_DTYPES[packed.scale.dtype],
            TRITON_DTYPES[dtype],
            tile.rows,
            units // of_run,
            of_run,
            tokens,
            steps,
        )


@triton.jit
def _dequantize(weight, index, w_hat, first, count, C: tl.constexpr):
    """Write ``W_hat`` of `count` rows from `first` on, or of those that `index` names."""
    out, tile = tile_rows(C), tl.program_id(1)
    there, column = out < count, tile_columns(tile, C)
    row = first + out if index is None else tl.load(index + out, there, other=0).to(tl.int64)
    tl.store(w_hat + out * C.columns + column, decode(weight, row, there, tile, C), there & (column < C.columns))


# Tiles of codes have four dimensions: rows, runs of units that share a scale, units, codes of a unit. A thread of a GPU
# then holds whole words of codes, as many in a row as it loads at once.


@triton.jit
def tile_rows(C: tl.constexpr):
    """Rows of a program, int64 ``(rows, 1, 1, 1)``."""
    return (tl.program_id(0) * C.rows + tl.arange(0, C.rows)).to(tl.int64)[:, None, None, None]


@triton.jit
def _runs(tile, C: tl.constexpr):
    """First units of the runs of a tile, ``(1, runs, 1, 1)``."""
    return ((tile * C.runs + tl.arange(0, C.runs)) * C.units)[None, :, None, None]


@triton.jit
def _units(tile, C: tl.constexpr):
    """Units of a row that a tile takes, ``(1, runs, units, 1)``."""
    return _runs(tile, C) + tl.arange(0, C.units)[None, None, :, None]


@triton.jit
def tile_columns(tile, C: tl.constexpr):
    """Columns of a tile, ``(1, runs, units, codes of a unit)``."""
    return _units(tile, C) * C.per_unit + tl.arange(0, C.per_unit)[None, None, None, :]


@triton.jit
def decode(weight, row, there, tile, C: tl.constexpr):
    """``W_hat`` of a tile, in the dtype of the product; what lies beyond the columns is zero."""
    code = _codes(weight.codes, row, there, _units(tile, C), C)
    if C.groups == 1 or C.group % C.per_unit == 0:  # as few scales as the groups allow
        group = _runs(tile, C) * C.per_unit // C.group
    else:
        group = tile_columns(tile, C) // C.group
    inside = there & (group < C.groups)
    s = tl.load(weight.scale + row * C.groups + group, inside, other=0.0).to(tl.float32)
    if weight.zero_point is None:
        steps = _exact(code) - (_INTEGERS + (1 << (C.bits - 1)))
    else:
        steps = _exact(code) - _exact(_zero_points(weight.zero_point, row, inside, group, C))
    w_hat = nearest(steps * s, C.stored)
    if C.stored != C.out:
        w_hat = nearest(w_hat.to(tl.float32), C.out)
    if C.columns % C.per_unit != 0:  # the last unit of a row has codes of no column
        w_hat = tl.where(tile_columns(tile, C) < C.columns, w_hat, tl.zeros_like(w_hat))
    return w_hat


@triton.jit
def _codes(codes, row, there, unit, C: tl.constexpr):
    """Codes from 0 on, uint32, of the bit stream that a row is."""
    i = tl.arange(0, C.per_unit)[None, None, None, :]
    place = codes + row * C.words
    if C.bits == 3:  # units begin at bit 0 of a word and at bit 16 of the one after it, in turn
        first, shift = unit * 3 // 2, (unit % 2 * 16).to(tl.uint64)
        low, high = _word(place, first, there, C).to(tl.uint64), _word(place, first + 1, there, C).to(tl.uint64)
        stream = (low | (high << 32)) >> shift
        return ((stream >> (i * 3).to(tl.uint64)) & 7).to(tl.uint32)
    else:
        return (_word(place, unit, there, C) >> (i * C.bits).to(tl.uint32)) & ((1 << C.bits) - 1)


@triton.jit
def _word(place, word, there, C: tl.constexpr):
    """Words of rows, uint32; zero beyond them."""
    inside = there & (word < C.words)
    return tl.load(place + word, inside, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _zero_points(zero_point, row, inside, group, C: tl.constexpr):
    """Zero points of rows and groups, uint32: the column of each group is a bit stream along the rows."""
    word, shift = row * C.bits // 32, row * C.bits % 32
    place = zero_point + word * C.groups + group
    low = tl.load(place, inside, other=0).to(tl.uint32, bitcast=True)
    high = tl.zeros_like(low)
    if C.bits == 3:
        ends_there = inside & (shift > 29) & (word + 1 < C.zero_words)
        high = tl.load(place + C.groups, ends_there, other=0).to(tl.uint32, bitcast=True)
    return _code_at(low, high, shift, C)


@triton.jit
def _code_at(low, high, shift, C: tl.constexpr):
    """The code that begins at bit `shift` of a word, and may end in the word after it."""
    shift = shift.to(tl.uint32)
    return ((low >> shift) | ((high << 1) << (31 - shift))) & ((1 << C.bits) - 1)


@triton.jit
def _exact(code):
    """2^23 + an unsigned integer below 2^23, in float32: without a conversion, of which GPUs do few at a time."""
    return (code | _INTEGER_BITS).to(tl.float32, bitcast=True)
