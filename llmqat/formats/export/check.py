"""Refuse what a format does not hold bit for bit, with the nearest grid to train instead."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmqat.errors import LlmqatError, shortened_list
from llmqat.formats.export.holds import HOLDS, Holds, nearest
from llmqat.formats.export.source import Source
from llmqat.models.coverage import HEAD, TIED_HEAD, LayerCoverage
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme

# Layers that engines run as one, by the last part of their names.
FUSED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")


def check_held(source: Source, to: str, allow_rounding: bool = False) -> bool:
    """Whether the format `to` holds a packed model bit for bit, and not only rounded, where that is allowed.

    Raises:
        LlmqatError: naming the first layer that it does not hold, and the nearest grid to train instead.
    """
    exactly = _why_not_held(source, to, allow_rounding=False)
    if not exactly:
        return True
    rounded = _why_not_held(source, to, allow_rounding=True)
    if allow_rounding and not rounded:
        return False
    remedy = "" if rounded else "; or export with --allow-rounding, which measures what is lost"
    raise LlmqatError(rounded if allow_rounding else f"{exactly}{remedy}")


def _why_not_held(source: Source, to: str, allow_rounding: bool) -> str:
    try:
        _check_held(source, to, allow_rounding)
    except LlmqatError as error:
        return str(error)
    return ""


def _check_held(source: Source, to: str, allow_rounding: bool) -> None:
    holds, head = HOLDS[to], source.model.get_output_embeddings()
    if allow_rounding:
        holds = replace(holds, asymmetric=holds.asymmetric + holds.rounded)
    role = TIED_HEAD if source.tied_embedding() else HEAD
    floats = [
        LayerCoverage(name, (0, 0), None)
        for name in source.float_linears()
        if source.model.get_submodule(name) is not head
    ]
    names = {name: source.file_name(name) for name in source.layers}
    found = [
        LayerCoverage(names[name], (layer.out_features, layer.in_features), layer.scheme, "", role * (layer is head))
        for name, layer in source.layers.items()
    ]
    check_grids(holds, to, [*floats, *found])
    for name, layer in source.layers.items():
        problem = next(problems_of_file(holds, layer, allow_rounding), None)
        if problem is not None:
            raise LlmqatError(f"{to} cannot hold {names[name]} without loss: {problem}")


def check_grids(holds: Holds, to: str, layers: Sequence[LayerCoverage]) -> None:
    """Refuse grids of the layers of a model that a format or engine `to` does not hold.

    Raises:
        LlmqatError: naming the first layer that it does not hold, and the nearest grid to train instead.
    """
    schemes = {layer.name: layer.scheme for layer in layers if layer.scheme is not None}
    grids = {replace(scheme, act_bits=None, act_static=False, scale_dtype=None): None for scheme in schemes.values()}
    if len(grids) > 1 and not holds.mixed:
        raise LlmqatError(
            f"{to} holds one grid for all layers, and this model has {', '.join(map(str, grids))}; train without "
            "--override and --lm-head-bits"
        )
    floats = [layer.name for layer in layers if layer.scheme is None and not layer.role]
    if floats and not holds.float_layers:
        raise LlmqatError(
            f"{to} has every linear layer of the blocks on the grid, and {shortened_list(floats)} are float; train "
            "without the override that keeps them so"
        )
    for layer in layers:
        problem = next(problems(holds, layer), None)
        if problem is not None:
            raise LlmqatError(f"{to} cannot hold {layer.name} without loss: {problem}")
    if holds.fused:
        check_fused(to, {layer.name: layer.scheme for layer in layers})


def check_fused(to: str, schemes: dict[str, QuantScheme | None]) -> None:
    """Refuse layers that an engine runs as one, and that have several grids.

    Raises:
        LlmqatError: naming them.
    """
    for name in schemes:
        parent, _, own = name.rpartition(".")
        others = [f"{parent}.{part}" for parts in FUSED if own == parts[0] for part in parts[1:]]
        other = next((other for other in others if schemes.get(other, schemes[name]) != schemes[name]), None)
        if other is not None:
            raise LlmqatError(
                f"{to} runs {name} and {other} as one layer, and they are {schemes[name] or 'float'} and "
                f"{schemes[other] or 'float'}; override both alike"
            )


def problems(holds: Holds, layer: LayerCoverage) -> Iterator[str]:
    """Reasons why the grid of a layer is not held, each with its remedy."""
    scheme = layer.scheme
    if scheme is None:
        return
    rows, columns = layer.shape
    if layer.role and not holds.head:
        yield "the output head has to be float there; train without --lm-head-bits"
    if layer.role == TIED_HEAD and not holds.tied_head:
        yield "an embedding that shares codes with the output head has to be float there; train without --lm-head-bits"
    held = scheme.bits in holds.bits(scheme.symmetric) and holds.holds_group(scheme.group_length(columns), columns)
    if not held:
        yield f"it is {scheme}; {nearest(holds, scheme, columns)}"
    if rows % holds.rows:
        yield f"it has {rows} rows, no multiple of {holds.rows}; keep it float with an override"


def problems_of_file(holds: Holds, layer: PackedLinear, allow_rounding: bool = False) -> Iterator[str]:
    """Reasons why a layer is not held as the packed file has it, whatever its grid, each with its remedy."""
    if layer.stored_transposed and not holds.transposed:
        yield "it keeps its weight as (in, out), as Conv1D does; export to dense"
    if holds.scale_dtype is not None:
        dtype = getattr(torch, holds.scale_dtype)
        inexact = inexact_scales(layer.weight_scale, dtype)
        lost = inexact[~inexact.to(dtype).isfinite() | (inexact.to(dtype) == 0)]
        refused = lost if allow_rounding else inexact
        if len(refused):
            yield (
                f"{len(refused)} of its {layer.weight_scale.numel()} scales, {float(refused[0]):.6g} among them, are "
                f"{'beyond' if allow_rounding else 'no'} {holds.scale_dtype} numbers; train with --scale-dtype "
                f"{holds.scale_dtype}"
            )


def inexact_scales(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales that change when they are stored in `dtype`."""
    return scale[scale.to(dtype).to(scale.dtype) != scale]
