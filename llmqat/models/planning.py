"""Which layers of a model are quantized, how, and why not the rest: before anything is changed."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from math import gcd
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from llmqat.config import DEFAULT_BOS, Recipe, Resolved, fit_context, resolve
from llmqat.errors import LlmqatError
from llmqat.models.architectures import block_paths, needed_bos
from llmqat.models.coverage import (
    HEAD,
    TIED_HEAD,
    CoverageReport,
    LayerCoverage,
    by_expert,
    check_coverage,
    total_parameters,
)
from llmqat.models.experts import check_experts, expert_layers, fused_experts, fused_shapes, reads_experts, routers
from llmqat.models.replaceable import check_merged, obstacles
from llmqat.nn.embedding import embed_scale_of
from llmqat.nn.expert_layout import is_fused
from llmqat.nn.linear_like import LINEAR_LAYERS, is_transposed, linear_shape
from llmqat.scheme import QuantScheme

# Weights per scale where a recipe names none, the first that divides. 128 is what vLLM, GPTQ and AWQ models have and
# most published tables measure; hidden sizes such as SmolLM2's 576 and 960 need 64.
GROUP_SIZES = (128, 64, 32)

ROUTER, FUSED = "it picks the experts", "fused experts of a layout that llmqat cannot split"
NARROW = "its rows are shorter than a group"

# Pattern -> changes to the scheme, or "float". Later patterns win.
Overrides = Mapping[str, Mapping[str, Any] | str]


def scheme_of(name: str, scheme: QuantScheme, overrides: Overrides) -> QuantScheme | None:
    """The scheme of layer `name` after `overrides`; None for float.

    Raises:
        LlmqatError: if a change is neither "float" nor fields of a scheme.
    """
    result: QuantScheme | None = scheme
    for pattern, change in overrides.items():
        if not re.search(pattern, name):
            continue
        if change == "float":
            result = None
        elif isinstance(change, Mapping) and set(change) <= set(scheme.to_dict()):
            result = replace(result or scheme, **change)
        else:
            fields = ", ".join(scheme.to_dict())
            raise LlmqatError(f"override {pattern!r}: write float, or any of {fields} with a value; got {change!r}")
    return result


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output head and the input embedding are one matrix."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weight = getattr(head, "weight", None)
    return weight is not None and weight is getattr(embedding, "weight", None)


def plan(
    model: PreTrainedModel, scheme: QuantScheme, overrides: Overrides | None = None, lm_head_bits: int | None = None
) -> CoverageReport:
    """Which linear layers `prepare` would quantize, how, and why not the rest. Changes nothing; meta tensors will do.

    Raises:
        LlmqatError: if adapters are not merged, an override is malformed, matches no layer, or gives experts or
            `Conv1D` layers several schemes, or `lm_head_bits` finds no head it can quantize.
    """
    check_merged(model)
    overrides = overrides or {}
    found = list(_candidates(model))
    check_overrides(overrides, [name for name, _, _ in found])
    check_head(model, lm_head_bits)
    head, layers, outside = model.get_output_embeddings(), [], outside_blocks(model)
    blocked = obstacles(model) | dict.fromkeys(routers(model), ROUTER)
    split = {id(model.get_submodule(name)) for name in fused_experts(model)}
    blocked |= {name: FUSED for name, _, module in found if is_fused(module) and id(module) not in split}
    for name, shape, module in found:
        role = "" if module is not head else TIED_HEAD if is_tied(model) else HEAD
        reason, grid = float_reason(model, name, module, outside), scheme
        if role and lm_head_bits is not None:
            reason, grid = "", replace(scheme, bits=lm_head_bits)
        reason = reason or blocked.get(name, "")
        own = None if reason else scheme_of(name, grid, overrides)
        if own is not None and shape[1] < min(GROUP_SIZES[-1], own.group_size):
            own, reason = None, blocked.setdefault(name, NARROW)
        turned = is_transposed(module)
        layers.append(LayerCoverage(name, shape, own, "" if own else reason or "override", role, turned))
    check_experts(layers)
    check_transposed(model, layers)
    apart = not split or reads_experts(model)
    return CoverageReport(
        tuple(layers), total_parameters(model), *block_parameters(model, blocked), experts_apart=apart
    )


def checked_plan(
    model: PreTrainedModel,
    scheme: QuantScheme,
    overrides: Overrides | None = None,
    lm_head_bits: int | None = None,
    min_coverage: float = 0.9,
) -> CoverageReport:
    """A `plan` that can be carried out: enough of the blocks is quantized, and every group size divides its rows.

    Raises:
        LlmqatError: see `plan`, `check_coverage` and `check_divisible`; or if no layer would be quantized.
    """
    report = plan(model, scheme, overrides, lm_head_bits)
    if not report.quantized:
        raise LlmqatError(f"{type(model).__name__} has no linear layer to quantize: {report.summary()}")
    check_coverage(report, min_coverage)
    check_divisible(report)
    return report


def resolve_for(model: PreTrainedModel, recipe: Recipe) -> Resolved:
    """The recipe with everything chosen that it leaves to `model`, and lengths that fit its context.

    Raises:
        LlmqatError: see `plan`.
    """
    group_size = default_group_size(model, recipe.quant.overrides, recipe.quant.lm_head_bits)
    resolved = resolve(recipe, total_parameters(model), group_size, needed_bos(model) or DEFAULT_BOS)
    return fit_context(resolved, getattr(model.config.get_text_config(), "max_position_embeddings", None))


def default_group_size(
    model: PreTrainedModel, overrides: Overrides | None = None, lm_head_bits: int | None = None
) -> int:
    """The largest of `GROUP_SIZES` that divides the rows of every layer to be quantized.

    The smallest of them where none does: `check_divisible` then names the layers and the remedies. Layers to which
    `overrides` give a group size of their own have no say.
    """
    planned = plan(model, QuantScheme(group_size=GROUP_SIZES[0]), overrides, lm_head_bits)
    rows = {layer.shape[1] for layer in planned.quantized if layer.scheme and layer.scheme.group_size == GROUP_SIZES[0]}
    return next((size for size in GROUP_SIZES if all(row % size == 0 for row in rows)), GROUP_SIZES[-1])


def block_parameters(model: PreTrainedModel, blocked: Collection[str] = ()) -> tuple[int, dict[str, int]]:
    """Parameters of the blocks, and the sizes of those of them that are no weight of a layer that can be quantized;
    those of `blocked` layers cannot."""
    outside = outside_blocks(model)
    in_blocks = {name: p.numel() for name, p in model.named_parameters() if not outside(name)}
    covered, split = set(), fused_experts(model)
    for path, module in model.named_modules():
        if isinstance(module, LINEAR_LAYERS) and path not in blocked:
            covered.add(f"{path}.weight")
        elif path in split:
            covered.update(name for name, parameter in module.named_parameters(path) if parameter.ndim == 3)
    return sum(in_blocks.values()), {name: size for name, size in in_blocks.items() if name not in covered}


def _candidates(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int], nn.Module]]:
    """Name, shape ``(out, in)`` and module of every linear layer in model order; the Linears of an expert have the
    fused module that holds them."""
    split = fused_experts(model)
    for name, module in model.named_modules():
        if isinstance(module, LINEAR_LAYERS):
            yield name, linear_shape(module), module
        elif is_fused(module):
            layout = split.get(name)
            layers = fused_shapes(name, module) if layout is None else expert_layers(name, module, layout)
            yield from ((layer, shape, module) for layer, shape in layers)


def check_overrides(overrides: Overrides, names: list[str]) -> None:
    """Every pattern must be a regular expression that matches one of the layers `names`.

    Raises:
        LlmqatError: if one is not, or does not.
    """
    for pattern in overrides:
        try:
            re.compile(pattern)
        except re.error as error:
            raise LlmqatError(f"override {pattern!r} is not a regular expression: {error}") from error
        if not any(re.search(pattern, name) for name in names):
            raise LlmqatError(
                f"override {pattern!r} matches no linear layer; the first ones are {', '.join(names[:4])}"
            )


def check_head(model: PreTrainedModel, lm_head_bits: int | None) -> None:
    """The output head must be one that can be quantized, if it is asked for.

    Raises:
        LlmqatError: if it is not.
    """
    if lm_head_bits is None:
        return
    if not isinstance(model.get_output_embeddings(), nn.Linear):
        raise LlmqatError(
            f"lm_head_bits is {lm_head_bits}, but {type(model).__name__} has no Linear output head; leave it out"
        )
    if is_tied(model):
        embed_scale_of(model.get_input_embeddings())
        text = model.config.get_text_config()
        if text is not model.config and getattr(text, "hidden_size_per_layer_input", None):
            # Gemma 4 with towers indexes the matrix of the embedding, which is then none.
            raise LlmqatError(
                f"lm_head_bits is {lm_head_bits}, but {type(model).__name__} reads the tied embedding of its side "
                "inputs as a matrix; leave it out"
            )


def check_transposed(model: PreTrainedModel, layers: list[LayerCoverage]) -> None:
    """Where weights lie as ``(in, out)``, transformers reads one grid for all layers, the one it finds first.

    Raises:
        LlmqatError: if there are several.
    """
    grids = {(layer.scheme, layer.transposed) for layer in layers if layer.scheme}
    if len(grids) > 1 and any(transposed for _, transposed in grids):
        named = [f"{scheme}{'' if transposed else ' of a Linear'}" for scheme, transposed in grids]
        raise LlmqatError(
            f"layers of {type(model).__name__} are Conv1D, for which a packed file has one grid, not "
            f"{' and '.join(sorted(named))}; give all the same, or keep some float with an override"
        )


def float_reason(model: PreTrainedModel, name: str, module: nn.Module, outside: Callable[[str], bool]) -> str:
    """Why layer `name` of `module` stays float whatever the overrides say; empty if it does not have to. `outside` is
    `outside_blocks` of the model."""
    embedding = model.get_input_embeddings()
    if getattr(module, "weight", module) is getattr(embedding, "weight", None):
        return TIED_HEAD
    if module is model.get_output_embeddings():
        return HEAD
    if outside(name):
        return "outside the blocks"
    return ""


def outside_blocks(model: PreTrainedModel) -> Callable[[str], bool]:
    """Whether a layer or parameter, by name, lies outside the blocks; where those cannot be found, in an embedding or
    output head."""
    try:
        inside = tuple(f"{path}." for path in block_paths(model))
    except LlmqatError:
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        paths = {path for path, module in model.named_modules() if any(module is end for end in ends)}
        return lambda name: name.rpartition(".")[0] in paths
    return lambda name: not name.startswith(inside)


def check_divisible(report: CoverageReport) -> None:
    """Every group size must divide its rows.

    Raises:
        LlmqatError: naming all layers that do not, and the remedies.
    """
    bad = [layer for layer in report.quantized if layer.scheme and not layer.scheme.divides(layer.shape[1])]
    if not bad:
        return
    named = ", ".join(f"{name} (in_features {layer.shape[1]})" for name, layer in by_expert(bad))
    common = gcd(*(layer.shape[1] for layer in report.quantized))
    leaves = sorted({layer.name.rsplit(".", 1)[-1] for layer in bad})
    overrides = " ".join(f"--override '{leaf}$:group_size=-1'" for leaf in leaves)
    assert bad[0].scheme is not None
    raise LlmqatError(
        f"group_size {bad[0].scheme.group_size} does not divide {len(bad)} layers: {named}; give those one group per "
        f"row with {overrides} (Python: overrides={{'{leaves[0]}$': {{'group_size': -1}}}}), or keep them float with "
        f"'{leaves[0]}$:float', or choose a --group-size that divides {common}"
    )
