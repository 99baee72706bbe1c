"""`prepare`: put a model's Linear layers on their grid. `convert`: turn them into what ships."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from math import gcd
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.algorithms.activation_ranges import observe_activations
from llmqat.algorithms.calibration import check_batches, gptq_head, gptq_model
from llmqat.algorithms.smoothquant import AUTO, Smoothed, smooth_model
from llmqat.errors import LlmqatError
from llmqat.models.architectures import Architecture, architecture_of, blocks_of
from llmqat.models.coverage import HEAD, TIED_HEAD, CoverageReport, LayerCoverage, by_expert, total_parameters
from llmqat.models.experts import check_experts, expert_layers, fused_shapes, split_experts, splits
from llmqat.models.smooth_sites import folds_of
from llmqat.nn.embedding import FakeQuantEmbedding, PackedEmbedding, embed_scale_of
from llmqat.nn.experts import is_fused
from llmqat.nn.fake_quant_linear import DEFAULT_OBSERVER, FakeQuantLinear
from llmqat.nn.kv_cache import kv_bits_of, quantize_kv, serve_int8_kv
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme

INITS = ("gptq", "rtn")
# GPTQ leaves output heads of this many bits and more to round-to-nearest.
HEAD_RTN_BITS = 8
GPTQ_REMEDY = "use --init rtn, or add a row to models/architectures.py"
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
    """Which Linear layers `prepare` would quantize, how, and why not the rest. Changes nothing; meta devices welcome.

    Raises:
        LlmqatError: if an override is malformed, matches no layer, or gives experts several schemes, or `lm_head_bits`
            finds no head it can quantize.
    """
    overrides = overrides or {}
    found = list(_candidates(model))
    names = [name for name, _, _ in found]
    for pattern in overrides:
        try:
            re.compile(pattern)
        except re.error as error:
            raise LlmqatError(f"override {pattern!r} is not a regular expression: {error}") from error
        if not any(re.search(pattern, name) for name in names):
            raise LlmqatError(
                f"override {pattern!r} matches no Linear layer; the first ones are {', '.join(names[:4])}"
            )
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    role = TIED_HEAD if is_tied(model) else HEAD
    if lm_head_bits is not None:
        if not isinstance(head, nn.Linear):
            raise LlmqatError(
                f"lm_head_bits is {lm_head_bits}, but {type(model).__name__} has no Linear output head; leave it out"
            )
        if role == TIED_HEAD:
            embed_scale_of(embedding)
    layers = []
    for name, shape, module in found:
        own, reason = scheme_of(name, scheme, overrides), "override"
        if module is head and lm_head_bits is not None:
            own = scheme_of(name, replace(scheme, bits=lm_head_bits), overrides)
        elif module is head or getattr(module, "weight", module) is getattr(embedding, "weight", None):
            own, reason = None, role
        elif not isinstance(module, nn.Linear) and not splits(model):
            own, reason = None, f"fused experts, and {model.config.model_type!r} has no router in architectures.py"
        layers.append(LayerCoverage(name, shape, own, "" if own else reason, role=role if module is head else ""))
    check_experts(layers)
    return CoverageReport(tuple(layers), total_parameters(model))


def _candidates(model: PreTrainedModel) -> Iterator[tuple[str, tuple[int, int], nn.Module]]:
    """Name, shape ``(out, in)`` and module of every Linear in model order; the Linears of an expert have the fused
    module that holds them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, (module.out_features, module.in_features), module
        elif is_fused(module):
            layers = expert_layers(name, module) if splits(model) else fused_shapes(name, module)
            yield from ((layer, shape, module) for layer, shape in layers)


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
        "row "
        f"with {overrides} (Python: overrides={{'{leaves[0]}$': {{'group_size': -1}}}}), or keep them float with "
        f"'{leaves[0]}$:float', or choose a --group-size that divides {common}"
    )


def smoothable(model: PreTrainedModel) -> Architecture:
    """The row of a family that SmoothQuant can do something for.

    Raises:
        LlmqatError: if the family has no row, or no site in it.
    """
    architecture = architecture_of(model, "SmoothQuant", "leave --smooth out, or add a row to models/architectures.py")
    if not architecture.smooth_sites:
        raise LlmqatError(
            f"SmoothQuant has no exact site in model type {model.config.model_type!r}; leave --smooth out, or add its "
            "sites to models/smooth_sites.py"
        )
    return architecture


def smooth(
    model: PreTrainedModel,
    batches: list[Tensor],
    alpha: float | str = 0.5,
    *,
    scheme: QuantScheme | None = None,
    overrides: Overrides | None = None,
    storage_dtype: torch.dtype | None = None,
) -> dict[str, Smoothed]:
    """SmoothQuant: fold activation outliers into the weights of a float `model`, in place; see `smooth_model`.

    Args:
        model: not prepared yet.
        batches: token ids ``(batch, length)``.
        alpha: strength in [0, 1], or "auto": searched by site with the quantizers of `scheme`.
        scheme: the grid that `prepare` will use; "auto" needs it.
        overrides: those of `prepare`.
        storage_dtype: that of `prepare`.

    Raises:
        LlmqatError: if the family has no row or no site, alpha is out of range, or a fold changed the float logits.
    """
    if alpha == AUTO and scheme is None:
        raise LlmqatError(
            f"alpha {AUTO!r} searches with the real quantizers; pass scheme=QuantScheme(...) as to prepare"
        )
    architecture = smoothable(model)
    grid = partial(scheme_of, scheme=scheme or QuantScheme(), overrides=overrides or {})
    folds = [
        fold
        for index, block in enumerate(blocks_of(model, architecture))
        for fold in folds_of(block, f"{architecture.blocks}.{index}.", architecture.smooth_sites, model.config, grid)
    ]
    return smooth_model(model, folds, batches, alpha, storage_dtype or model.dtype)


def prepare(
    model: PreTrainedModel,
    scheme: QuantScheme,
    *,
    init: str = "rtn",
    calibration: list[Tensor] | None = None,
    overrides: Overrides | None = None,
    storage_dtype: torch.dtype | None = None,
    damp: float = 0.01,
    clip_mask: bool = False,
    keep_float: bool = False,
    lm_head_bits: int | None = None,
    kv_bits: int | None = None,
    observer: str = DEFAULT_OBSERVER,
) -> CoverageReport:
    """Replace the Linear layers of `model` by `FakeQuantLinear`, in place; the Parameter objects stay the same.

    Fused experts are split first, and their Parameters are new ones: make an optimizer after this.

    Args:
        model: any model with `nn.Linear`.
        scheme: the grid of every layer, unless overridden.
        init: "rtn" rounds to nearest; "gptq" also needs `calibration` and a known model family.
        calibration: token ids ``(batch, length)``, all of one shape.
        overrides: regular expression on layer names -> ``{"bits": 8}`` and the like, or ``"float"``.
        storage_dtype: dtype of scales and float parts in the packed file; by default the model's.
        damp: GPTQ's damping.
        clip_mask: see `fake_quant_linear`.
        keep_float: GPTQ leaves weights as they are and keeps its change apart (half the bytes of a float32 weight), so
            that `disable_quantizers` runs the float model: distillation without a second copy.
        lm_head_bits: quantize the output head too, with `scheme` at these bits; a tied embedding then looks up rows of
            the same grid. None leaves both float.
        kv_bits: 8 quantizes keys and values as the cache stores them; see `llmqat.nn.kv_cache`.
        observer: how static activation ranges are found; on `calibration` if there is any, and while training.

    Raises:
        LlmqatError: if a group size does not divide, the model is prepared already, or GPTQ lacks what it needs.
    """
    if init not in INITS:
        raise LlmqatError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if any(isinstance(module, FakeQuantLinear) for module in model.modules()):
        raise LlmqatError("this model is prepared already; load it again to prepare it with another scheme")
    report = plan(model, scheme, overrides, lm_head_bits)
    if not report.quantized:
        raise LlmqatError(f"{type(model).__name__} has no Linear layer to quantize: {report.summary()}")
    check_divisible(report)
    if init == "gptq":  # what it lacks is said before anything is replaced
        architecture_of(model, "GPTQ", GPTQ_REMEDY)
        check_batches(calibration or [])
    _replace_layers(model, report, storage_dtype or model.dtype, clip_mask)
    if kv_bits is not None:
        quantize_kv(model, kv_bits)
    observe_activations(model, calibration or [], observer)
    if init == "gptq":
        report.errors.update(run_gptq(model, calibration or [], damp, keep_float))
    return report


def _replace_layers(model: PreTrainedModel, report: CoverageReport, dtype: torch.dtype, clip_mask: bool) -> None:
    """Put a `FakeQuantLinear` in the place of each layer to quantize; an embedding tied to one looks up its rows."""
    split_experts(model)
    for layer in report.quantized:
        linear = model.get_submodule(layer.name)
        assert isinstance(linear, nn.Linear)
        assert layer.scheme is not None
        compute = linear.weight.dtype
        model.set_submodule(layer.name, FakeQuantLinear.from_linear(linear, layer.scheme, dtype, clip_mask))
        if layer.role == TIED_HEAD:
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings
            model.set_input_embeddings(FakeQuantEmbedding.from_embedding(embedding, head, compute))


def run_gptq(
    model: PreTrainedModel, batches: list[Tensor], damp: float = 0.01, keep_float: bool = False
) -> dict[str, tuple[float, float | None]]:
    """GPTQ on a model prepared with round-to-nearest, in place.

    Returns:
        layer -> relative output error of round-to-nearest, and of GPTQ; see `CoverageReport.errors`.

    Raises:
        LlmqatError: if there is no calibration data, the family is unknown, or a Hessian cannot be used.
    """
    architecture = architecture_of(model, "GPTQ", GPTQ_REMEDY)
    errors = gptq_model(model, blocks_of(model, architecture), batches, damp, keep_float)
    head = model.get_output_embeddings()
    if isinstance(head, FakeQuantLinear) and head.scheme.bits < HEAD_RTN_BITS:
        errors.append(gptq_head(model, head, batches, damp, keep_float))
    return {error.layer: (error.rtn, error.gptq) for error in errors}


def plain_model(model: nn.Module) -> PreTrainedModel:
    """The transformers model itself, out of its `PeftModel` if it is in one."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(root, PreTrainedModel)
    return root


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, FakeQuantLinear, dict[str, Any]]]:
    """Every layer on a grid: its name in the plain model, the layer, and its adapters as arguments of the forward."""
    for name, module in plain_model(model).named_modules():
        if isinstance(module, LoraFakeQuantLinear):
            yield name, module.base_layer, module.adapters()
        elif isinstance(module, FakeQuantLinear) and not name.endswith(".base_layer"):
            yield name, module, {}


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every `FakeQuantLinear` by a `PackedLinear` holding the codes of its forward, in place.

    Raises:
        LlmqatError: if no layer of the model is on a grid.
    """
    layers = list(quantized_layers(model))
    if not layers:
        raise LlmqatError("nothing to convert: no layer of this model is quantized; call llmqat.prepare first")
    root = plain_model(model)
    for name, layer, lora in layers:
        root.set_submodule(name, PackedLinear.from_fake_quant(layer, **lora))
    embedding = root.get_input_embeddings()
    if isinstance(embedding, FakeQuantEmbedding):
        root.set_input_embeddings(PackedEmbedding.from_fake_quant(embedding))
    if kv_bits_of(root) is not None:
        serve_int8_kv(root)
    return root


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters outside the grid: norms, embeddings, the output head, biases; neither quantizers nor adapters."""
    layers = [layer for _, layer, _ in quantized_layers(model)]
    on_grid = {id(p) for layer in layers for p in (layer.weight, layer.scale, layer.zero_point)}
    on_grid |= {id(p) for m in model.modules() if isinstance(m, LoraFakeQuantLinear) for p in m.adapter_parameters()}
    return [p for p in plain_model(model).parameters() if id(p) not in on_grid]


@torch.no_grad()
def round_float_parts(model: nn.Module) -> None:
    """Round every float parameter outside the grid to the dtype it will be stored in.

    Called once after training, so that what is measured and verified is to the bit what is written.
    """
    dtype = next(layer.scale_dtype for _, layer, _ in quantized_layers(model))
    for parameter in float_parameters(model):
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
