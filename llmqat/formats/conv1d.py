"""Packed tensors of a layer that keeps its weight as ``(in, out)``: GPT-2's `Conv1D`.

compressed-tensors stores a weight in the layout of its layer, and its groups run along the last axis. Groups along `in`
of an ``(in, out)`` weight are its *blocks* of ``group_size x 1``: the same codes and scales, turned.

| tensor | `PackedLinear` | file |
|---|---|---|
| `weight_packed` | int32 ``(out, words of in)`` | int32 ``(in, words of out)`` |
| `weight_scale` | ``(out, groups)`` | ``(groups, out)`` |
| `weight_zero_point` | int32 ``(words of out, groups)`` | int8 ``(groups, out)``, less ``2^(bits - 1)`` |
| `weight_shape` | ``[out, in]`` | ``[in, out]`` |
"""

import torch
from torch import Tensor

from llmqat.quant.packing import pack_rows, unpack_rows


def turn(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Tensors of a `PackedLinear` by name, as the file holds them."""
    out_features, in_features = tensors["weight_shape"].tolist()
    turned = _turned(tensors, bits, in_features)
    if "weight_zero_point" in tensors:
        zero_point = unpack_rows(tensors["weight_zero_point"].T.contiguous(), bits, out_features)
        turned["weight_zero_point"] = (zero_point.int() - (1 << (bits - 1))).to(torch.int8)
    return turned


def turn_back(tensors: dict[str, Tensor], bits: int, out_features: int) -> dict[str, Tensor]:
    """Inverse of `turn`."""
    turned = _turned(tensors, bits, out_features)
    if "weight_zero_point" in tensors:
        zero_point = (tensors["weight_zero_point"].int() + (1 << (bits - 1))).to(torch.uint8)
        turned["weight_zero_point"] = pack_rows(zero_point, bits).T.contiguous()
    return turned


def _turned(tensors: dict[str, Tensor], bits: int, length: int) -> dict[str, Tensor]:
    """Codes in rows of `length`, scale and shape turned; the rest (the bias) as it is."""
    codes = unpack_rows(tensors["weight_packed"], bits, length)
    return {
        **tensors,
        "weight_packed": pack_rows(codes.T.contiguous(), bits),
        "weight_scale": tensors["weight_scale"].T.contiguous(),
        "weight_shape": tensors["weight_shape"].flip(0),
    }
