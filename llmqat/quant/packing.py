"""Codes to int32 words and back: the one definition of the bit order.

A row of unsigned codes is a bit stream: code ``i`` takes bits ``[i * bits, (i + 1) * bits)``, least significant
first, and bit ``k`` of the stream is bit ``k % 32`` of word ``k // 32`` (compressed-tensors ``pack-quantized``,
"dense" for 3 bits: a code may cross words). The last word is filled with zeros. So for 4 bits the codes 0..7 give the
word 0x76543210.
"""

import torch
from torch import Tensor

from llmqat.scheme import QuantScheme


def packed_width(length: int, bits: int) -> int:
    """Number of int32 words that hold `length` codes."""
    return -(-length * bits // 32)


def pack_rows(codes: Tensor, bits: int) -> Tensor:
    """Pack unsigned codes ``(rows, length)``, uint8 below ``2^bits``, into int32 ``(rows, packed_width)``."""
    rows, length = codes.shape
    words = packed_width(length, bits)
    if bits == 3:  # 8 codes fill 3 bytes; spread them over 24 bits of an int32 and keep three of its four bytes
        padded = torch.nn.functional.pad(codes, (0, -length % 8)).view(rows, -1, 8).int()
        as_bytes = _bytes_of(_accumulate(padded, bits)).view(rows, -1, 4)[..., :3].flatten(1)
    else:
        per_byte = 8 // bits
        padded = torch.nn.functional.pad(codes, (0, -length % per_byte)).view(rows, -1, per_byte)
        as_bytes = _accumulate(padded, bits)
    fitted = torch.nn.functional.pad(as_bytes, (0, max(0, words * 4 - as_bytes.shape[1])))[:, : words * 4]
    return fitted.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _bytes_of(words: Tensor) -> Tensor:
    """The bytes ``(rows, 4 n)`` of words ``(rows, n)``; `contiguous` leaves a dimension of size 1 an odd stride."""
    words = words.contiguous() if words.stride(-1) == 1 else words.clone(memory_format=torch.contiguous_format)
    return words.view(torch.uint8)


def _accumulate(codes: Tensor, bits: int) -> Tensor:
    """Shift each code of the last dimension to its place and combine them into one integer of the same dtype."""
    packed = codes[..., 0].clone()
    for i in range(1, codes.shape[-1]):
        packed |= codes[..., i] << (i * bits)
    return packed


def unpack_rows(packed: Tensor, bits: int, length: int) -> Tensor:
    """Inverse of `pack_rows`: int32 ``(rows, words)`` to uint8 codes ``(rows, length)``."""
    if bits == 3:
        as_bytes = _bytes_of(packed)
        padded = torch.nn.functional.pad(as_bytes, (0, -as_bytes.shape[1] % 3))
        triples: Tensor = padded.unflatten(1, (-1, 3)).int()
        chunks = triples[..., 0] | triples[..., 1] << 8 | triples[..., 2] << 16
        shifts = torch.arange(0, 24, 3, device=packed.device, dtype=torch.int32)
    else:
        chunks = _bytes_of(packed)
        shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    codes = (chunks.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    return codes.flatten(1)[:, :length].to(torch.uint8)


def unpack_at(packed: Tensor, bits: int, index: Tensor) -> Tensor:
    """Codes at the columns `index` ``(n,)`` of every row: int32 ``(rows, words)`` to uint8 ``(rows, n)``."""
    first = index * bits // 32
    low = packed[:, first].long() & 0xFFFFFFFF
    high = packed[:, (first + 1).clamp(max=packed.shape[1] - 1)].long()  # a code of 3 bits may cross into it
    return ((low | high << 32) >> index * bits % 32 & (1 << bits) - 1).to(torch.uint8)


def to_unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of a scheme as stored: ``codes - qmin``, uint8."""
    return (codes.int() - scheme.qmin).to(torch.uint8)


def from_unsigned(stored: Tensor, scheme: QuantScheme) -> Tensor:
    """Inverse of `to_unsigned`: int8 for a symmetric scheme, uint8 else."""
    return (stored.int() + scheme.qmin).to(torch.int8 if scheme.symmetric else torch.uint8)
