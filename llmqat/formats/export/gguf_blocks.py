"""The blocks of GGUF that hold our grids without a change: 32 weights of a row, behind a float16 scale ``d``.

| type | bytes | layout | a weight is |
|---|---|---|---|
| `Q4_0` | 18 | ``d``; byte j: weight j in the low nibble, weight j + 16 in the high one | ``d * (nibble - 8)`` |
| `Q5_0` | 22 | ``d``; bit j of 4 bytes: the fifth bit of weight j; then the nibbles of Q4_0 | ``d * (code - 16)`` |
| `Q8_0` | 34 | ``d``; 32 int8 | ``d * code`` |

Our weight is ``scale * (code - zero_point)``. The difference is an integer, and the smallest type that holds all that a
scheme can give is taken. So zero points need no rounded minimum, as in Q4_1: 4 bits with them go to Q5_0.
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.scheme import QuantScheme

BLOCK = 32  # weights


class BlockType(NamedTuple):
    """A type of blocks.

    Attributes:
        name: in GGUF.
        low: least integer that a weight can be, in units of the scale.
        high: largest one.
        bytes: of a block.
    """

    name: str
    low: int
    high: int
    bytes: int


BLOCK_TYPES = (BlockType("Q4_0", -8, 7, 18), BlockType("Q5_0", -16, 15, 22), BlockType("Q8_0", -128, 127, 34))


def block_type(scheme: QuantScheme) -> BlockType:
    """The smallest type that holds every weight of a grid."""
    low, high = (scheme.qmin, scheme.qmax) if scheme.symmetric else (-scheme.qmax, scheme.qmax)
    return next(kind for kind in BLOCK_TYPES if kind.low <= low and high <= kind.high)


def to_blocks(codes: Tensor, scale: Tensor, zero_point: Tensor | None, kind: BlockType) -> Tensor:
    """Blocks, uint8 ``(out, in / 32 * bytes)``, of codes ``(out, in)`` on a grid that `kind` holds; see
    `llmqat.quant.affine` for the shapes."""
    rows, length = codes.shape
    integers: Tensor = codes.int().unflatten(1, (scale.shape[1], -1))
    if zero_point is not None:
        integers = integers - zero_point.int().unsqueeze(-1)
    integers = integers.view(rows, -1, BLOCK)
    d = scale.to(torch.float16).repeat_interleave(length // BLOCK // scale.shape[1], 1)
    parts = [d.contiguous().view(torch.uint8).view(rows, -1, 2)]
    if kind.name == "Q8_0":
        parts.append(integers.to(torch.int8).view(torch.uint8))
    else:
        stored = (integers - kind.low).to(torch.uint8)
        if kind.name == "Q5_0":
            parts.append(_fifth_bits(stored))
        parts.append(stored[..., :16] & 15 | stored[..., 16:] << 4)
    return torch.cat(parts, -1).flatten(1)


def _fifth_bits(stored: Tensor) -> Tensor:
    """Bit 4 of 32 codes as 4 bytes, the first in the lowest bit."""
    bits = (stored >> 4).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    packed: Tensor = bits.sum(-1, dtype=torch.uint8)
    return packed
