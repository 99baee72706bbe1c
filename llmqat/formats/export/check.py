"""Refuse what a format does not hold bit for bit, with the nearest grid to train instead."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from llmqat.errors import LlmqatError, shortened_list
from llmqat.formats.export.holds import HOLDS, RUN_PACKED, Holds, nearest
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
    names = {source.file_name(name): layer for name, layer in source.layers.items()}
    floats = (name for name in source.float_linears() if source.model.get_submodule(name) is not head)
    on_grid = next((name for name, layer in names.items() if layer is head), "")
    layers = layers_of(names, floats, {on_grid: TIED_HEAD if source.tied_embedding() else HEAD})
    if found := conflict(holds, layers, [holds]):
        raise LlmqatError(f"{to} {found}")
    for name, layer in names.items():
        problem = next(problems_of_file(holds, layer, allow_rounding), None)
        if problem is not None:
            raise LlmqatError(f"{to} cannot hold {name} without loss: {problem}")


def layers_of(
    packed: Mapping[str, PackedLinear], floats: Iterable[str], roles: Mapping[str, str]
) -> list[LayerCoverage]:
    """The linear layers of a packed model: `floats` by their names, and those on a grid, by name their `roles`."""
    found = [
        LayerCoverage(
            name,
            (layer.out_features, layer.in_features),
            layer.scheme,
            role=roles.get(name, ""),
            transposed=layer.stored_transposed,
        )
        for name, layer in packed.items()
    ]
    return [*(LayerCoverage(name, (0, 0), None) for name in floats), *found]


def conflict(holds: Holds, layers: Sequence[LayerCoverage], among: Sequence[Holds]) -> str:
    """The first thing in the grids of a model that a format or engine does not hold, with its remedy; empty if there is
    none.

    Args:
        holds: the grids that it holds.
        layers: every linear layer of the model.
        among: all formats and engines that the remedy has to suit.

    Returns:
        what follows the name of the format or engine, or several names.
    """
    schemes = {layer.name: layer.scheme for layer in layers if layer.scheme is not None}
    grids = {replace(scheme, act_bits=None, act_static=False, scale_dtype=None): None for scheme in schemes.values()}
    if len(grids) > 1 and not holds.mixed:
        return (
            f"cannot hold several grids, and this model has {', '.join(map(str, grids))}; train without --override and "
            "--lm-head-bits"
        )
    floats = [layer.name for layer in layers if layer.scheme is None and not layer.role]
    if floats and not holds.float_layers:
        return (
            f"cannot hold float linear layers of the blocks, and {shortened_list(floats)} are; train without the "
            "override that keeps them so"
        )
    for layer in layers:
        problem = next(problems(holds, layer, among), None)
        if problem is not None:
            return f"cannot hold {layer.name} without loss: {problem}"
    return _fused_conflict({layer.name: layer.scheme for layer in layers}) if holds.fused else ""


def _fused_conflict(schemes: dict[str, QuantScheme | None]) -> str:
    """The first two layers that engines run as one, and that have several grids."""
    for name in schemes:
        parent, _, own = name.rpartition(".")
        others = [f"{parent}.{part}" for parts in FUSED if own == parts[0] for part in parts[1:]]
        other = next((other for other in others if schemes.get(other, schemes[name]) != schemes[name]), None)
        if other is not None:
            return (
                f"cannot run {name} and {other}, one layer there, as {schemes[name] or 'float'} and "
                f"{schemes[other] or 'float'}; override both alike"
            )
    return ""


def arithmetic_conflict(holds: Holds, layers: Sequence[LayerCoverage], kv_bits: int | None) -> str:
    """The part of the arithmetic of training that an engine does not run, with its remedy; empty if it runs all.

    Args:
        holds: what it runs.
        layers: every linear layer of the model.
        kv_bits: width of its cache; None for a float one.

    Returns:
        what follows the name of the engine, or several names.
    """
    if any(layer.scheme is not None and layer.scheme.inputs not in holds.inputs for layer in layers):
        flag = "--act-static" if "dynamic" in holds.inputs else "--act-bits"
        return f"cannot run the int8 activations of {flag} as they were trained; train without it"
    if kv_bits is not None and kv_bits not in holds.kv_bits:
        return f"cannot run the int8 cache of --kv-bits {kv_bits}, only a float one; train without it"
    return ""


def in_one_line(conflicts: Mapping[str, str]) -> str:
    """Conflicts of formats and engines by their names, those that share one together; empty if there is none."""
    names: dict[str, list[str]] = {}
    for name, problem in conflicts.items():
        if problem:
            names.setdefault(problem, []).append(name)
    return "; ".join(f"{_enumerated(own)} {problem}" for problem, own in names.items())


def _enumerated(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else names[0]


def not_run(layers: Sequence[LayerCoverage], kv_bits: int | None) -> str:
    """Which engines that run packed directories do not run one of such layers, why, and the remedy; empty if all do."""
    found = {
        name: conflict(holds, layers, [holds]) or arithmetic_conflict(holds, layers, kv_bits)
        for name, holds in RUN_PACKED.items()
    }
    line = in_one_line(found)
    return f"{line}; or give it the output of llmqat export --to dense" if line else ""


def problems(holds: Holds, layer: LayerCoverage, among: Sequence[Holds]) -> Iterator[str]:
    """Reasons why the grid of a layer is not held, each with a remedy that suits all formats and engines `among`."""
    scheme = layer.scheme
    if scheme is None:
        return
    rows, columns = layer.shape
    if layer.transposed and not holds.transposed:
        yield "its weight is (in, out), as in Conv1D; llmqat export --to dense holds it"
    if layer.role and not holds.head:
        yield "the output head has to be float there; train without --lm-head-bits"
    if layer.role == TIED_HEAD and not holds.tied_head:
        yield "an embedding that shares codes with the output head has to be float there; train without --lm-head-bits"
    held = scheme.bits in holds.bits(scheme.symmetric) and holds.holds_group(scheme.group_length(columns), columns)
    if not held:
        yield f"it is {scheme}; {nearest(among, scheme, columns)}"
    if rows % holds.rows:
        yield f"it has {rows} rows, no multiple of {holds.rows}; keep it float with an override"


def problems_of_file(holds: Holds, layer: PackedLinear, allow_rounding: bool = False) -> Iterator[str]:
    """Reasons why a layer is not held as the packed file has it, whatever its grid, each with its remedy."""
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
