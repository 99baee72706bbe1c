"""Products with packed weights: codes are read as the file holds them, and become ``W_hat`` in registers.

``W_hat = scale * (codes - zero_point)`` is rounded to the dtype of the scale and then to that of `x`, bit for bit as
`llmqat.kernels.ops.reference` has it; products are summed in float32, the bias is added, and the sum is rounded once.

Few tokens (`FEW_TOKENS` of `tiles`): a weight is read once, ``bits / 8`` bytes, with scales of ``2 / group`` beside it.
Where the rows alone make too few programs, each takes a part of the columns, and a second launch adds the parts, always
in their order. More tokens: one launch reads the codes and writes ``W_hat``, 2 bytes in bfloat16, and the product is
that of torch. Nothing waits for the device, and what is launched depends on shapes alone: a CUDA graph can hold it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmqat.kernels.activations import fake_quantize_activation
from llmqat.kernels.gpu.launch import on, registers
from llmqat.kernels.gpu.numerics import EXACT, INTERPRETED, TRITON_DTYPES, nearest
from llmqat.kernels.gpu.packed_weight import (
    Constants,
    Weight,
    decode,
    dequantize,
    has_whole_units,
    tile_columns,
    tile_rows,
)
from llmqat.kernels.gpu.tiles import (
    FEW_TOKENS,
    FEWEST_TOGETHER,
    MOST_TOGETHER,
    Parts,
    Tile,
    parts_of,
    power_of_two,
    product_tile,
)
from llmqat.kernels.packed import Packed

# Weights whose W_hat is held at once: 256 MB in 16 bits. A layer is smaller, an output head may be larger.
MOST_HELD = 1 << 27
SUM_BLOCK = 1024
# Of a thread: said, because ptxas else takes a few less than it needs on Hopper, and spills.
REGISTERS = 128


def takes(x: Tensor, packed: Packed) -> bool:
    """Whether the kernels know the dtypes of an input and of a layer: all but float64."""
    dtypes = {x.dtype, packed.scale.dtype} | (set() if packed.bias is None else {packed.bias.dtype})
    return dtypes <= TRITON_DTYPES.keys()


def multiply(x: Tensor, packed: Packed) -> Tensor:
    """`llmqat.kernels.ops.packed_linear` of a checked layer and input, of which `takes` holds.

    Args:
        x: ``(..., in)``.
        packed: the layer.
    """
    out_features = packed.codes.shape[0]
    flat = x.detach().reshape(-1, packed.in_features).contiguous()
    if not len(flat):
        return x.new_empty(*x.shape[:-1], out_features)
    if packed.act_bits is not None:
        flat = fake_quantize_activation(flat)
    few = len(flat) <= FEW_TOKENS[x.element_size()] and has_whole_units(packed)
    y = few_tokens(flat, packed) if few else many_tokens(flat, packed)
    return y.view(*x.shape[:-1], out_features)


def few_tokens(x: Tensor, packed: Packed, tile: Tile | None = None, parts: Parts | None = None) -> Tensor:
    """Product that reads the codes themselves: ``(tokens, out)``.

    Up to 64 tokens of 16 bits are multiplied at once by tensor cores, also a single one: they leave a GPU's other units
    to the codes. Each token of float32, which tensor cores would round, has programs of its own.

    Args:
        x: ``(tokens, in)``, contiguous, as it is multiplied.
        packed: the layer, of which `has_whole_units` holds.
        tile: of a program; None for that of the table.
        parts: of the columns; None for those of the table.
    """
    tokens, (rows, columns) = len(x), (packed.codes.shape[0], packed.in_features)
    together = x.dtype != torch.float32
    tile = tile or product_tile(packed.bits, columns, together)
    at_once = max(FEWEST_TOGETHER, power_of_two(min(tokens, MOST_TOGETHER))) if together else 1
    along_rows, along_tokens = triton.cdiv(rows, tile.rows), triton.cdiv(tokens, at_once)
    parts = parts or parts_of(columns, tile.width, along_rows * along_tokens)
    weight, constants = Weight.of(packed), Constants.of(packed, x.dtype, tile, at_once, parts.steps)
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    # float32, whatever `y` is; a single part is the sum itself
    sums = y if parts.number == 1 else torch.empty(parts.number, tokens, rows, device=x.device)
    kernel = _multiply_together if together else _multiply_single
    options = {"num_warps": tile.warps, **registers(REGISTERS, x.device)}
    with on(x.device):
        # Each multiplication that an addition follows is of `x` and W_hat: one rounding for both is the better sum.
        kernel[along_rows, parts.number, along_tokens](
            weight, x, sums, rows, tokens, constants, enable_fp_fusion=True, **options
        )
        if parts.number > 1:
            _add_parts[(triton.cdiv(y.numel(), SUM_BLOCK),)](
                sums, weight.bias, y, tokens, rows, parts.number, BLOCK=SUM_BLOCK, **EXACT
            )
    return y


def many_tokens(x: Tensor, packed: Packed) -> Tensor:
    """Product of torch with ``W_hat``, which is made anew each time: ``(tokens, out)``.

    The allocator of torch hands out the memory of the layer before for it, in whatever stream or graph this runs.

    Args:
        x: ``(tokens, in)``, contiguous, as it is multiplied.
        packed: the layer.
    """
    rows = packed.codes.shape[0]
    bias = None if packed.bias is None else packed.bias.to(x.dtype)
    step = max(1, MOST_HELD // packed.in_features)
    if step >= rows:
        return torch.nn.functional.linear(x, dequantize(packed, x.dtype), bias)
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        part = slice(start, min(start + step, rows))
        w_hat = dequantize(packed, x.dtype, part)
        y[:, part] = torch.nn.functional.linear(x, w_hat, None if bias is None else bias[part])
    return y


@triton.jit(do_not_specialize=["tokens"])
def _multiply_single(weight, x, sums, rows, tokens, C: tl.constexpr):
    """Sums of one token and some rows over a part of the columns, in float32; a thread adds those of its words."""
    row, part, token = tile_rows(C), tl.program_id(1), tl.program_id(2)
    total = tl.full([C.rows, C.runs, C.units], 0.0, tl.float32)
    for step in range(C.steps):
        tile = part * C.steps + step
        w_hat = decode(weight, row, row < rows, tile, C).to(tl.float32)
        column = tile_columns(tile, C)
        values = tl.load(x + token.to(tl.int64) * C.columns + column, column < C.columns, other=0.0)
        total += tl.sum(w_hat * values.to(tl.float32), 3)
    total = tl.sum(tl.reshape(total, [C.rows, C.runs * C.units]), 1)
    _store_sums(total[:, None], weight.bias, sums, token + tl.arange(0, 1), (rows, tokens), C)


@triton.jit(do_not_specialize=["tokens"])
def _multiply_together(weight, x, sums, rows, tokens, C: tl.constexpr):
    """Sums of some tokens and rows over a part of the columns, in float32, by tensor cores."""
    row, part, token = tile_rows(C), tl.program_id(1), tl.program_id(2) * C.tokens + tl.arange(0, C.tokens)
    width: tl.constexpr = C.runs * C.units * C.per_unit
    total = tl.full([C.rows, C.tokens], 0.0, tl.float32)
    for step in range(C.steps):
        tile = part * C.steps + step
        w_hat = tl.reshape(decode(weight, row, row < rows, tile, C), [C.rows, width])
        column = tile * width + tl.arange(0, width)
        inside = (token < tokens)[:, None] & (column < C.columns)[None, :]
        values = tl.load(x + token.to(tl.int64)[:, None] * C.columns + column[None, :], inside, other=0.0)
        if INTERPRETED:  # it multiplies the bits of bfloat16 as integers
            w_hat, values = w_hat.to(tl.float32), values.to(tl.float32)
        total = tl.dot(w_hat, tl.trans(values), total)
    _store_sums(total, weight.bias, sums, token, (rows, tokens), C)


@triton.jit
def _store_sums(total, bias, sums, token, counts, C: tl.constexpr):
    """Write ``(rows, tokens)`` as the result with its bias, or as one of several parts; `counts` are those of all."""
    rows, tokens = counts[0], counts[1]
    row = tl.program_id(0) * C.rows + tl.arange(0, C.rows)
    inside = (row < rows)[:, None] & (token < tokens)[None, :]
    place = token.to(tl.int64)[None, :] * rows + row[:, None]
    if C.steps * C.runs * C.units * C.per_unit >= C.columns:
        if bias is not None:
            total += _bias(bias, row, row < rows, C.out)[:, None]
        tl.store(sums + place, nearest(total, C.out), inside)
    else:
        tl.store(sums + tl.program_id(1).to(tl.int64) * tokens * rows + place, total, inside)


@triton.jit(do_not_specialize=["tokens", "parts"])
def _add_parts(sums, bias, y, tokens, rows, parts, BLOCK: tl.constexpr):
    """Add the parts of each result in their order, and its bias."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    count = tokens.to(tl.int64) * rows
    inside = place < count
    dtype: tl.constexpr = y.dtype.element_ty
    total = tl.full([BLOCK], 0.0, tl.float32)
    for part in range(parts):
        total += tl.load(sums + part * count + place, inside, other=0.0)
    if bias is not None:
        total += _bias(bias, place % rows, inside, dtype)
    tl.store(y + place, nearest(total, dtype), inside)


@triton.jit
def _bias(bias, row, inside, dtype: tl.constexpr):
    """Bias of rows as the reference adds it: rounded to the dtype of the result, in float32."""
    return nearest(tl.load(bias + row, inside, other=0.0).to(tl.float32), dtype).to(tl.float32)
