"""Training modes and their learning rates: all weights, LoRA inside the quantizer, or scales and norms.

Learning rates are relative, so that one default fits models of any size: a weight's in codes (fractions of its layer's
median scale), any other tensor's as a fraction of its own root mean square.
"""

import warnings
from pathlib import Path
from statistics import median
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llmqat.compat.peft import reading_targets, register_layers
from llmqat.config import ResolvedTrain
from llmqat.errors import LlmqatError
from llmqat.models.patcher import quantized_layers
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.train.adapter_files import is_norm, load_beside, saving_all
from llmqat.train.expert_adapters import targets_apart, tensors_apart


def default_alpha(model: nn.Module, r: int) -> float:
    """The alpha with which adapters count in codes: ``alpha / r`` is the median scale of the model.

    Their learning rate then does not depend on the size of the weights (LR-QAT, arXiv 2406.06385, section 3.2).

    Raises:
        LlmqatError: if no layer is quantized.
    """
    medians = [float(on_grid.layer.scale.detach().abs().median()) for on_grid in quantized_layers(model)]
    if not medians:
        raise LlmqatError("no layer of this model is quantized; call llmqat.prepare before add_lora")
    return r * median(medians)


def add_lora(model: PreTrainedModel, r: int = 32, alpha: float | None = None, adapter: str | None = None) -> PeftModel:
    """Put LoRA inside every quantizer of a prepared model; everything else is frozen.

    Args:
        model: prepared by `llmqat.prepare`.
        r: rank.
        alpha: scaling is ``alpha / r``; by default adapters count in codes, see `default_alpha`.
        adapter: directory of a saved adapter to load instead of a fresh one, with the scales and norms beside it.

    Returns:
        a `PeftModel`; its ``save_pretrained`` writes an ordinary adapter directory, and a file of scales and norms.

    Raises:
        LlmqatError: if the model is not prepared, or peft leaves a layer out.
    """
    if adapter is None:
        alpha = default_alpha(model, r) if alpha is None else alpha
        names = [on_grid.name for on_grid in quantized_layers(model)]
        task = "CAUSAL_LM" if model.can_generate() else None
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules=names, task_type=task)  # type: ignore[arg-type]
    else:
        config = LoraConfig.from_pretrained(adapter)
    register_layers(config, {FakeQuantLinear: LoraFakeQuantLinear})
    with warnings.catch_warnings(), reading_targets(targets_apart, tensors_apart):
        # peft would leave the embedding behind; ours looks up rows of the adapted head.
        warnings.filterwarnings("ignore", "Model has `tie_word_embeddings=True`")
        if adapter is None:
            adapted = get_peft_model(model, config)
            without = sorted({*names} - {on_grid.name for on_grid in quantized_layers(adapted) if on_grid.adapters})
            if without:
                raise LlmqatError(
                    f"peft gave no adapter to {len(without)} layers, the first is {without[0]}; train with --train "
                    "full or scales, or install another version of peft"
                )
            return saving_all(adapted)  # type: ignore[arg-type]
        loaded = PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)
        load_beside(loaded, Path(adapter))
        return saving_all(loaded)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the LoRA adapters inside the quantizers of a model."""
    return [
        p for module in model.modules() if isinstance(module, LoraFakeQuantLinear) for p in module.adapter_parameters()
    ]


def select_trainable(model: nn.Module, mode: str, scales: bool = True, norms: bool = True) -> None:
    """Set ``requires_grad`` for `mode`.

    full: everything but zero points, and but the scales where `scales` is False. lora: the adapters; the scales where
    `scales`, and the norms where `norms`. scales: the scales, and the norms where `norms`. A scale that trains is
    decoupled from the codes first, so that it moves none of them.

    Raises:
        LlmqatError: if the mode is LoRA, and the model has no adapters.
    """
    if mode == "lora":
        if not any(parameter.requires_grad for parameter in adapter_parameters(model)):
            raise LlmqatError(
                "mode 'lora' trains adapters, and this model has none that train; call model = llmqat.add_lora(model) "
                "first, or train with mode='full' or mode='scales'"
            )
    else:
        for parameter in model.parameters():
            parameter.requires_grad_(mode == "full" and parameter.is_floating_point())
    scales = scales or mode == "scales"
    for layer in (on_grid.layer for on_grid in quantized_layers(model)):
        if scales:
            layer.decouple_scale()
        layer.scale.requires_grad_(scales)
        for frozen in (layer.zero_point, layer.compensation_step, layer.code_scale):
            if frozen is not None:
                frozen.requires_grad_(False)
    for module in model.modules():
        if is_norm(module):
            module.requires_grad_(norms or mode == "full")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def freeze_scales(model: nn.Module) -> None:
    """Let no scale of a model train: where the grid is switched off, none gets a gradient."""
    for on_grid in quantized_layers(model):
        on_grid.layer.scale.requires_grad_(False)


def parameter_groups(model: nn.Module, mode: str, config: ResolvedTrain) -> list[dict[str, Any]]:
    """Optimizer groups of what trains: one of all adapters, and one per other tensor, each with its learning rate."""
    adapters = [parameter for parameter in adapter_parameters(model) if parameter.requires_grad]
    groups: list[dict[str, Any]] = [{"params": adapters, "lr": config.lr}] if adapters else []
    rates: dict[int, float] = {}
    for layer in (on_grid.layer for on_grid in quantized_layers(model)):
        step = float(layer.scale.detach().abs().median())
        rates[id(layer.weight)] = config.lr * step
        rates[id(layer.scale)] = (config.lr if mode == "scales" else config.lr_scale) * step
    grouped = set(map(id, adapters))
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in grouped:
            rate = rates.get(id(parameter))
            if rate is None:
                rate = config.lr_float * float(parameter.detach().square().mean().sqrt().clamp(min=1e-3))
            groups.append({"params": [parameter], "lr": rate})
    return groups
