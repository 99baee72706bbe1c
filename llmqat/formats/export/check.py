"""Refuse what a format does not hold bit for bit, with the nearest grid to train instead."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from llmqat.errors import LlmqatError, shortened_list
from llmqat.formats.export.holds import HOLDS, Holds, nearest
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear


def check_held(source: Source, to: str) -> None:
    """Refuse a packed model that the format `to` does not hold bit for bit.

    Raises:
        LlmqatError: naming the first layer that it does not hold, and the nearest grid to train instead.
    """
    holds, head = HOLDS[to], source.model.get_output_embeddings()
    grids = {replace(layer.scheme, act_bits=None, act_static=False): None for layer in source.layers.values()}
    if len(grids) > 1 and not holds.mixed:
        found = ", ".join(map(str, grids))
        raise LlmqatError(
            f"{to} holds one grid for all layers, and this model has {found}; train without --override and "
            "--lm-head-bits"
        )
    floats = [name for name in source.float_linears() if source.model.get_submodule(name) is not head]
    if floats and not holds.float_layers:
        raise LlmqatError(
            f"{to} has every linear layer of the blocks on the grid, and {shortened_list(floats)} are float; train "
            "without the override that keeps them so"
        )
    for name, layer in source.layers.items():
        problem = next(problems(holds, layer, layer is head, source.tied_embedding() is not None), None)
        if problem is not None:
            raise LlmqatError(f"{to} cannot hold {source.file_name(name)} without loss: {problem}")


def problems(holds: Holds, layer: PackedLinear, is_head: bool, tied: bool) -> Iterator[str]:
    """Reasons why a layer is not held, each with its remedy."""
    scheme = layer.scheme
    length = scheme.group_length(layer.in_features)
    if layer.stored_transposed and not holds.transposed:
        yield "it keeps its weight as (in, out), as Conv1D does; export to dense"
    if is_head and not holds.head:
        yield "the output head has to be float there; train without --lm-head-bits"
    if is_head and tied and not holds.tied_head:
        yield "an embedding that shares codes with the output head has to be float there; train without --lm-head-bits"
    if scheme.bits not in holds.bits(scheme.symmetric) or not holds.holds_group(length):
        yield f"it is {scheme}; {nearest(holds, scheme, layer.in_features)}"
    if layer.out_features % holds.rows:
        yield f"it has {layer.out_features} rows, no multiple of {holds.rows}; keep it float with an override"
    if holds.scale_dtype is not None:
        inexact = inexact_scales(layer.weight_scale, getattr(torch, holds.scale_dtype))
        if len(inexact):
            yield (
                f"{len(inexact)} of its {layer.weight_scale.numel()} scales, {float(inexact[0]):.6g} among them, are "
                f"no {holds.scale_dtype} numbers; train with --scale-dtype {holds.scale_dtype}"
            )


def inexact_scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales that change when they are stored in `dtype`."""
    return scale[scale.to(dtype).to(scale.dtype) != scale]
