"""`prepare`: put a model's linear layers on their grid. `convert`: turn them into what ships."""

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.algorithms.activation_ranges import observe_activations
from llmqat.algorithms.blocks import check_batches
from llmqat.algorithms.blockwise import Blockwise
from llmqat.algorithms.gptq_model import GptqSettings, Saved, gptq_model
from llmqat.algorithms.smoothquant import AUTO, Smoothed, smooth_model
from llmqat.config import INITS
from llmqat.errors import LlmqatError
from llmqat.mapped import release
from llmqat.models.architectures import block_paths, blocks_of, check_blocks, check_init, known_architecture, whole_runs
from llmqat.models.coverage import TIED_HEAD, CoverageReport, LayerCoverage
from llmqat.models.experts import experts_as_linears, split_experts
from llmqat.models.loading import storage_dtype_of
from llmqat.models.planning import Overrides, checked_plan, scheme_of
from llmqat.models.prepare_options import PrepareOptions
from llmqat.models.site_search import find_sites
from llmqat.models.smooth_sites import folds_of
from llmqat.nn.embedding import FakeQuantEmbedding, PackedEmbedding
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.kv_cache import kv_bits_of, quantize_kv
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.nn.training_kernels import training_kernels
from llmqat.quant.affine import check_storable, check_weight
from llmqat.quant.grid import Adapters
from llmqat.scheme import QuantScheme
from llmqat.serve.int8_cache import serve_int8_kv
from llmqat.team import ALONE, Team

# GPTQ leaves output heads of this many bits and more to round-to-nearest.
HEAD_RTN_BITS = 8


def check_smoothable(model: PreTrainedModel) -> None:
    """Refuse a model in which SmoothQuant has nothing to do, or cannot look for it.

    Raises:
        LlmqatError: if its family has a row without sites, or its blocks cannot be walked through.
    """
    row = known_architecture(model)
    if row is not None and not row.smooth_sites:
        raise _without_sites(model)
    check_blocks(model)


def _without_sites(model: PreTrainedModel) -> LlmqatError:
    return LlmqatError(f"SmoothQuant has no exact site in model type {model.config.model_type!r}; leave --smooth out")


def smooth(
    model: PreTrainedModel,
    batches: list[Tensor],
    alpha: float | str = 0.5,
    *,
    scheme: QuantScheme | None = None,
    overrides: Overrides | None = None,
    storage_dtype: torch.dtype | None = None,
) -> dict[str, Smoothed]:
    """SmoothQuant (arXiv 2211.10438): fold activation outliers into the weights of a float `model`, in place; see
    `smooth_model`.

    Args:
        model: not prepared yet.
        batches: token ids ``(batch, length)``.
        alpha: strength in [0, 1], or "auto": searched by site with the quantizers of `scheme`.
        scheme: the grid that `prepare` will use; "auto" needs it.
        overrides: see `PrepareOptions`.
        storage_dtype: see `PrepareOptions`.

    Returns:
        what was done, by site: alpha, the relative change of the float logits, output errors where it was searched.

    Raises:
        LlmqatError: if there is no site, alpha is out of range, or a fold changed the float logits.
    """
    if alpha == AUTO and scheme is None:
        raise LlmqatError(
            f"alpha {AUTO!r} searches with the real quantizers; pass scheme=QuantScheme(...) as to prepare"
        )
    check_smoothable(model)
    check_batches(batches)
    grid = partial(scheme_of, scheme=scheme or QuantScheme(), overrides=overrides or {})
    [path], config, row = block_paths(model), model.config.get_text_config(), known_architecture(model)
    with experts_as_linears(model):
        sites = find_sites(model, batches[0]) if row is None else [row.smooth_sites] * len(blocks_of(model))
        folds = [
            fold
            for index, (block, own) in enumerate(zip(blocks_of(model), sites, strict=True))
            for fold in folds_of(block, f"{path}.{index}.", own, config, grid)
        ]
        if not folds:
            raise _without_sites(model)
        return smooth_model(model, folds, batches, alpha, storage_dtype or storage_dtype_of(model))


def prepare(
    model: PreTrainedModel,
    scheme: QuantScheme,
    *,
    init: str = "rtn",
    calibration: list[Tensor] | None = None,
    **options: Any,
) -> CoverageReport:
    """Replace the linear layers of `model` by `FakeQuantLinear`, in place; the Parameter objects stay the same.

    Fused experts are split first, and their Parameters are new ones: make an optimizer after this.

    Args:
        model: any model with `nn.Linear` or `Conv1D`. Other heads and poolers, outside its blocks, stay float. Weights
            become float32 masters; those of a model that is frozen (``model.requires_grad_(False)``) keep their dtype.
        scheme: the grid of every layer, unless overridden.
        init: "rtn" rounds to nearest; "gptq" (arXiv 2210.17323) and "blockwise", which goes on from it by training each
            block to its float output, also need `calibration`, and "blockwise" blocks that run in a row.
        calibration: token ids ``(batch, length)``, all of one shape.
        options: fields of `PrepareOptions`, such as ``kv_bits=8, keep_float=True``.

    Returns:
        every linear layer with its grid or the reason why it stays float; to print: ``summary()``, ``error_summary()``.

    Raises:
        LlmqatError: if an option is wrong, a group size does not divide, too little is covered, it is prepared already,
            or GPTQ lacks data.
    """
    chosen = PrepareOptions.by_name(options)
    if init not in INITS:
        raise LlmqatError(f"init must be one of {', '.join(INITS)}; got {init!r}")
    if any(isinstance(module, FakeQuantLinear) for module in model.modules()):
        raise LlmqatError("this model is prepared already; load it again to prepare it with another scheme")
    report = checked_plan(model, scheme, chosen.overrides, chosen.lm_head_bits, chosen.min_coverage)
    if init != "rtn":  # what it lacks is said before anything is replaced
        check_init(model, init)
        check_batches(calibration or [])
    put_on_grid(model, report.quantized, chosen.storage_dtype or storage_dtype_of(model), chosen.clip_mask)
    if chosen.kv_bits is not None:
        quantize_kv(model, chosen.kv_bits)
    observe_activations(model, calibration or [], chosen.observer)
    if init != "rtn":
        settings = settings_of(init, chosen.damp, chosen.keep_float, chosen.block_steps)
        report.errors.update(run_gptq(model, calibration or [], settings))
    return report


def put_on_grid(
    model: PreTrainedModel, layers: Iterable[LayerCoverage], dtype: torch.dtype, clip_mask: bool = False
) -> None:
    """Put a `FakeQuantLinear` with round-to-nearest scales, stored in `dtype`, in the place of each of `layers`; an
    embedding tied to one looks up its rows."""
    split_experts(model)
    layers = list(layers)
    for layer in layers:  # all of them before the first one is replaced
        assert layer.scheme is not None
        weight = model.get_submodule(layer.name).get_parameter("weight")
        check_weight(weight, layer.scheme, dtype, layer.name)
        release(weight)
    for layer in layers:
        linear = model.get_submodule(layer.name)
        assert layer.scheme is not None
        compute = linear.get_parameter("weight").dtype
        on_grid = FakeQuantLinear.from_linear(linear, layer.scheme, dtype, clip_mask)
        on_grid.name = layer.name
        release(on_grid.weight)
        model.set_submodule(layer.name, on_grid)
        if layer.role == TIED_HEAD:
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings
            model.set_input_embeddings(FakeQuantEmbedding.from_embedding(embedding, head, compute))


def settings_of(init: str, damp: float, keep_float: bool, block_steps: int) -> GptqSettings:
    """How codes are found block by block: by GPTQ alone, or with a reconstruction of each block behind it."""
    return GptqSettings(damp, keep_float, blockwise=Blockwise(block_steps) if init == "blockwise" else None)


def run_gptq(
    model: PreTrainedModel,
    batches: list[Tensor],
    settings: GptqSettings,
    saved: Saved | None = None,
    team: Team = ALONE,
) -> dict[str, tuple[float, float | None]]:
    """GPTQ, and what the settings say beside it, on a model prepared with round-to-nearest, in place; parts in `saved`
    are taken from there. The processes of `team` divide the work.

    Returns:
        layer -> relative output error of round-to-nearest, and of GPTQ; see `CoverageReport.errors`.

    Raises:
        LlmqatError: if there is no calibration data, its blocks cannot be found, or a Hessian cannot be used.
    """
    settings = settings._replace(whole=bool(whole_runs(model)))
    with training_kernels(model):
        errors = gptq_model(model, blocks_of(model), batches, settings, saved, gptq_head_of(model), team)
    if not settings.keep_float:
        for on_grid in quantized_layers(model):
            on_grid.layer.holds_float = False
    return {error.layer: (error.rtn, error.gptq) for error in errors}


def gptq_head_of(model: PreTrainedModel) -> FakeQuantLinear | None:
    """The output head of a prepared model, if it is one of those whose codes GPTQ finds."""
    head = model.get_output_embeddings()
    return head if isinstance(head, FakeQuantLinear) and head.scheme.bits < HEAD_RTN_BITS else None


def gptq_part_count(model: PreTrainedModel) -> int:
    """How many parts of a prepared model GPTQ finds codes for, one after the other: its blocks, and a head."""
    return len(blocks_of(model)) + (gptq_head_of(model) is not None)


def transformers_model(model: nn.Module) -> PreTrainedModel:
    """The model of transformers, taken out of its `PeftModel` if it is in one."""
    root = model.get_base_model() if isinstance(model, PeftModel) else model
    assert isinstance(root, PreTrainedModel)
    return root


class OnGrid(NamedTuple):
    """A layer on its grid, with all that its forward takes beside the input.

    Attributes:
        name: in the model of transformers, without peft's wrappers.
        layer: the layer itself.
        adapters: those inside its quantizer that are active now, or None.
    """

    name: str
    layer: FakeQuantLinear
    adapters: Adapters | None

    def codes(self) -> Tensor:
        """The codes of the forward, ``(out, in)``: int8 if symmetric, else uint8."""
        codes = self.layer.codes(self.adapters)
        self.release()
        return codes

    def clipped(self) -> Tensor:
        """How many weights lie more than half a code beyond the ends of the grid, a scalar."""
        clipped = self.layer.clipped(self.adapters)
        self.release()
        return clipped

    def release(self) -> None:
        """Let go of the memory of what lies in files."""
        release(self.layer.weight, self.layer.compensation_multiples)

    def check_storable(self) -> None:
        """Refuse to ship a layer whose tensors training has driven out of range.

        Raises:
            LlmqatError: if one of them holds NaN or infinity, or more than its storage dtype.
        """
        layer, adapters = self.layer, () if self.adapters is None else (self.adapters.a, self.adapters.b)
        masters: dict[str, Tensor | None] = {"weight": layer.weight, "zero point": layer.zero_point}
        masters["change by GPTQ"] = layer.compensation_step
        for what, master in masters.items():
            check_storable(master, torch.float32, f"the {what} of {self.name}")
        for tensor in adapters:
            check_storable(tensor, torch.float32, f"an adapter of {self.name}")
        for stored, what in ((layer.scale, "scale"), (layer.bias, "bias"), (layer.act_scale, "activation scale")):
            check_storable(stored, layer.storage_dtype, f"the {what} of {self.name}")

    def pack(self) -> PackedLinear:
        """The layer that ships, on copies of this one's codes and scales.

        Raises:
            LlmqatError: see `check_storable`; or if its static activations have no range.
        """
        self.check_storable()
        return PackedLinear.from_fake_quant(self.layer, self.codes())


def quantized_layers(model: nn.Module) -> list[OnGrid]:
    """Every layer on a grid, in the order of the model."""
    found = []
    for name, module in transformers_model(model).named_modules():
        if isinstance(module, LoraFakeQuantLinear):
            found.append(OnGrid(name, module.base_layer, module.adapters()))
        elif isinstance(module, FakeQuantLinear) and not name.endswith(".base_layer"):
            found.append(OnGrid(name, module, None))
    return found


def convert(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every `FakeQuantLinear` by a `PackedLinear` holding the codes of its forward, in place.

    Args:
        model: prepared; a `PeftModel` too, whose adapters go into the codes.

    Returns:
        the plain model, for inference only.

    Raises:
        LlmqatError: if no layer of the model is on a grid, or one cannot be stored.
    """
    layers = quantized_layers(model)
    if not layers:
        raise LlmqatError("nothing to convert: no layer of this model is quantized; call llmqat.prepare first")
    root = transformers_model(model)
    for on_grid in layers:  # all of them before the first one is replaced
        on_grid.check_storable()
    for on_grid in layers:
        root.set_submodule(on_grid.name, on_grid.pack())
    embedding = root.get_input_embeddings()
    if isinstance(embedding, FakeQuantEmbedding):
        root.set_input_embeddings(PackedEmbedding.from_fake_quant(embedding))
    if kv_bits_of(root) is not None:
        serve_int8_kv(root)
    return root


def float_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters outside the grid: norms, embeddings, the output head, biases; neither quantizers nor adapters."""
    layers = [found.layer for found in quantized_layers(model)]
    on_grid = {id(p) for layer in layers for p in layer.parameters() if p is not layer.bias}
    on_grid |= {id(p) for m in model.modules() if isinstance(m, LoraFakeQuantLinear) for p in m.adapter_parameters()}
    return [p for p in transformers_model(model).parameters() if id(p) not in on_grid]


@torch.no_grad()
def round_float_parts(model: nn.Module) -> None:
    """Round every float parameter outside the grid to the dtype it will be stored in.

    Called once after training, so that what is measured and verified is to the bit what is written.
    """
    dtype = quantized_layers(model)[0].layer.storage_dtype
    for parameter in float_parameters(model):
        parameter.data = parameter.data.to(dtype).to(parameter.dtype)
