"""`dense`: the dequantized model, an ordinary float checkpoint whose weights are bit for bit those that were trained.

``W_hat`` is computed in the dtype of its scales, as everywhere in llmqat, and written in it. Where float parts or other
scales have a wider dtype, all of the file has that one: nothing is rounded.
"""

from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor, nn

from llmqat.formats.export.directory import write_directory
from llmqat.formats.export.source import Source
from llmqat.models.experts import reads_experts
from llmqat.nn.experts import SplitExperts
from llmqat.nn.packed_linear import PackedLinear
from llmqat.progress import track
from llmqat.quant.affine import dequantize


def write_dense(source: Source, scratch: Path) -> None:
    """Write the dequantized model to `scratch`."""
    dtype = exact_dtype(source)
    write_directory(source, scratch, dense_tensors(source, dtype), dtype)


def exact_dtype(source: Source) -> torch.dtype:
    """The dtype that holds all of the model's weights and float parts exactly."""
    scales = (layer.weight_scale.dtype for layer in source.layers.values())
    return reduce(torch.promote_types, scales, source.model.dtype)


def dense_tensors(source: Source, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the float model, by its name in files."""
    fused = fused_again(source)
    inside = tuple(f"{name}." for name in fused)
    for name, tensor in source.float_parts():
        if not name.startswith(inside):
            yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
    for name, layer in track(source.layers.items(), "export", len(source.layers)):
        if name.startswith(inside):
            continue
        weight = dense_weight(layer).to(dtype)
        yield f"{source.file_name(name)}.weight", weight.T if layer.stored_transposed else weight
        if layer.bias is not None:
            yield f"{source.file_name(name)}.bias", layer.bias.to(dtype)
    for name, experts in fused.items():
        for own, tensor in experts.fused(dense_weight).items():
            yield f"{name}.{own}", tensor.to(dtype)


def fused_again(source: Source) -> dict[str, SplitExperts]:
    """Experts by name that transformers reads from files in one tensor for a block, as it makes them."""
    if reads_experts(source.model):
        return {}
    return {name: module for name, module in source.model.named_modules() if isinstance(module, SplitExperts)}


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight ``(out, in)`` of a packed layer, or of a float one."""
    if isinstance(layer, PackedLinear):
        return dequantize(*layer.unpack(), layer.scheme)
    return layer.get_parameter("weight").detach()
