"""Quantized tensors in the files of a checkpoint: which they are, by headers alone, and what they stand for.

MXFP4 as gpt-oss has it, E2M1 in blocks of 32 beside their exponents; FP8 with a scale for each block or tensor, under
the names of DeepSeek V3 and Qwen, of DeepSeek V4, whose experts may be in FP4, and of Mistral.
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.models.gguf_file import DAMAGED, DEQUANTIZED
from llmqat.models.stored import Header, headers_of

# E2M1, two to a byte, the low half first; an exponent of two for 32 of them. OCP Microscaling Formats 1.0, 5.3 and 6.3.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
# What stands in the place of a tensor in MXFP4, by the end of its name; dtypes in headers.
BLOCKS, SCALES, BYTES = "_blocks", "_scales", "U8"
# What stands beside one in eight bits, or four: of DeepSeek V3 and Qwen, of Mistral, of DeepSeek V4, and of Inkling 2.
SCALE, MISTRAL_SCALE, V4_SCALE, OTHER_SCALE = "_scale_inv", ".qscale_weight", ".scale", "_scale"
EIGHT_BITS, FOUR_BITS = ("F8_E4M3", "F8_E5M2"), "I8"
OF_ACTIVATIONS = ("activation_scale", ".input_scale", ".qscale_act")


class Codes(NamedTuple):
    """A quantized tensor in files.

    Attributes:
        tensor: its name in the float model.
        scales: name of its scales.
        block: rows and columns that a scale is for; fewer at the ends.
    """

    tensor: str
    scales: str
    block: tuple[int, int]


def quantized_tensors(directory: Path) -> dict[str, Codes]:
    """The quantized tensors of a checkpoint by the name of their codes, from headers; no tensor is read.

    Raises:
        LlmqatError: if the checkpoint is damaged, or holds tensors in another way than its config says.
    """
    found = {name: header for _, own in headers_of(directory) for name, header in own.items()}
    config = json.loads((directory / "config.json").read_text("utf-8"))
    quantization = config["quantization_config"]
    fp4 = "fp4" in (quantization.get("expert_dtype"), config.get("expert_dtype"))
    quantized: dict[str, Codes] = {}
    for name, header in found.items():
        tensor, scales = name.removesuffix(BLOCKS), _scales_of(name, header, found)
        if scales is None:
            continue
        if scales not in found:
            raise LlmqatError(f"{directory} lacks {scales}; {DAMAGED}, or start from the float model it was made of")
        shape = _shape(header, tensor != name, fp4)
        block = None if shape is None else _block(shape, found[scales].shape, quantization.get("weight_block_size"))
        if block is None:
            raise LlmqatError(
                f"{directory} holds {name} as {header.dtype} {list(header.shape)} with scales "
                f"{list(found[scales].shape)}, which is no format that is known; start from the float model it was "
                "made of"
            )
        quantized[name] = Codes(tensor, scales, block)
    return quantized


def dequantize(codes: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The numbers that codes stand for, matrix by matrix, in bfloat16.

    Args:
        codes: ``(..., out, in)`` float8; or bytes of two E2M1 codes along the last dimension.
        scales: a number for each block of a matrix, or one for all; integers are exponents of two.
        block: rows and columns of one, those at the ends being cut off.
    """
    if scales.numel() == 1:
        scales = scales.reshape(1, 1).expand(*codes.shape[:-2], 1, 1)
    if codes.ndim > 2:
        return torch.stack([dequantize(own, factors, block) for own, factors in zip(codes, scales, strict=True)])
    values = codes.float() if codes.is_floating_point() else _from_e2m1(codes.view(torch.uint8))
    factors = scales.float() if scales.is_floating_point() else torch.exp2(scales.float() - EXPONENT_BIAS)
    for dim, size in enumerate(block):
        factors = factors.repeat_interleave(size, dim).narrow(dim, 0, values.shape[dim])
    return (values * factors).to(DEQUANTIZED)


def _from_e2m1(codes: Tensor) -> Tensor:
    return torch.tensor(E2M1)[torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()]


def _scales_of(name: str, header: Header, found: dict[str, Header]) -> str | None:
    """Name of the scales of a tensor, which may be missing; None for one that is not quantized."""
    if name.endswith(BLOCKS):
        return name.removesuffix(BLOCKS) + SCALES
    layer = name.removesuffix(".weight")
    clear, vague = (name + SCALE, layer + MISTRAL_SCALE), (layer + V4_SCALE, name + OTHER_SCALE)
    quantized = header.dtype in (*EIGHT_BITS, FOUR_BITS)
    possible = [scales for scales in (*clear, *(vague if quantized else ())) if scales in found]
    return possible[0] if possible else name + SCALE if quantized else None


def _shape(header: Header, blocks: bool, fp4: bool) -> tuple[int, ...] | None:
    """Shape of what codes stand for; None if they are in no format that is known."""
    *leading, last = header.shape
    if blocks:
        return (*leading[:-1], leading[-1] * last * 2) if header.dtype == BYTES and len(leading) > 2 else None
    if header.dtype == FOUR_BITS and fp4:
        return *leading, last * 2
    return header.shape if header.dtype in EIGHT_BITS and leading else None


def _block(shape: tuple[int, ...], scales: tuple[int, ...], told: list[int] | None) -> tuple[int, int] | None:
    """Rows and columns that a scale is for: as the config says, else those by which the scales divide a matrix evenly;
    None where they do not."""
    *leading, rows, columns = shape
    if math.prod(scales) == 1:
        return rows, columns
    if told and scales == (*leading, -(-rows // told[0]), -(-columns // told[1])):
        return told[0], told[1]
    if scales[:-2] != tuple(leading) or len(scales) != len(shape) or rows % scales[-2] or columns % scales[-1]:
        return None
    return rows // scales[-2], columns // scales[-1]
