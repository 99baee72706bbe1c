"""Packed tensors of a layer that keeps its weight as ``(in, out)``: GPT-2's `Conv1D`.

compressed-tensors stores a weight in the layout of its layer, and its groups run along the last axis. Groups along `in`
of an ``(in, out)`` weight are its *blocks* of ``group_size x 1``: the same codes and scales with their axes swapped.

| tensor | `PackedLinear` | file |
|---|---|---|
| `weight_packed` | int32 ``(out, words of in)`` | int32 ``(in, words of out)`` |
| `weight_scale` | ``(out, groups)`` | ``(groups, out)`` |
| `weight_zero_point` | int32 ``(words of out, groups)`` | int8 ``(groups, out)``, less ``2^(bits - 1)`` |
| `weight_shape` | ``[out, in]`` | ``[in, out]`` |
"""

import torch
from torch import Tensor

from llmqat.quant.packing import pack_rows, packed_width, unpack_rows


def to_conv1d_layout(tensors: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Tensors of a `PackedLinear` by name in the layout of `Conv1D`, which the file holds."""
    out_features, in_features = tensors["weight_shape"].tolist()
    swapped = _swapped(tensors, bits, in_features)
    if "weight_zero_point" in tensors:
        zero_point = unpack_rows(tensors["weight_zero_point"].T.contiguous(), bits, out_features)
        swapped["weight_zero_point"] = (zero_point.int() - (1 << (bits - 1))).to(torch.int8)
    return swapped


def from_conv1d_layout(tensors: dict[str, Tensor], bits: int, out_features: int) -> dict[str, Tensor]:
    """Tensors of a file in the layout of `Conv1D`, as a `PackedLinear` holds them."""
    swapped = _swapped(tensors, bits, out_features)
    if "weight_zero_point" in tensors:
        zero_point = (tensors["weight_zero_point"].int() + (1 << (bits - 1))).to(torch.uint8)
        swapped["weight_zero_point"] = pack_rows(zero_point, bits).T.contiguous()
    return swapped


def _swapped(tensors: dict[str, Tensor], bits: int, length: int) -> dict[str, Tensor]:
    """Codes in rows of `length`, scale and shape with their axes swapped; the rest (the bias) as it is."""
    codes = unpack_rows(tensors["weight_packed"], bits, length)
    return {
        **tensors,
        "weight_packed": pack_rows(codes.T.contiguous(), bits),
        "weight_scale": tensors["weight_scale"].T.contiguous(),
        "weight_shape": tensors["weight_shape"].flip(0),
    }


def stored_layout(part: str, tensor: Tensor, shape: tuple[int, int], bits: int) -> Tensor:
    """The buffer `part` of a `PackedLinear` of `shape` ``(out, in)``, on the meta device, with the shape and dtype that
    it has in a file in the layout of `Conv1D`."""
    out_features, in_features = shape
    if part == "weight_packed":
        return tensor.new_empty((in_features, packed_width(out_features, bits)))
    if part == "weight_zero_point":
        return tensor.new_empty((tensor.shape[1], out_features), dtype=torch.int8)
    return tensor.T if part == "weight_scale" else tensor
