"""Training modes and their learning rates: all weights, LoRA inside the quantizer, or scales and norms.

Learning rates are relative, so that one default fits models of any size: a weight's in codes (fractions of its layer's
median scale), any other tensor's as a fraction of its own root mean square.
"""

import warnings
from statistics import median
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from llmqat.compat.peft import register_layers, targets_by_module
from llmqat.config import ResolvedTrain
from llmqat.errors import LlmqatError
from llmqat.models.patcher import quantized_layers
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.lora import LoraFakeQuantLinear


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
        adapter: directory of a saved adapter to load instead of a fresh one.

    Returns:
        an ordinary `PeftModel`; its ``save_pretrained`` writes an ordinary adapter directory.

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
    with warnings.catch_warnings(), targets_by_module():
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
            return adapted  # type: ignore[return-value]
        return PeftModel.from_pretrained(model, adapter, config=config, is_trainable=True)


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of the LoRA adapters inside the quantizers of a model."""
    return [
        p for module in model.modules() if isinstance(module, LoraFakeQuantLinear) for p in module.adapter_parameters()
    ]


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer, by the name of its class."""
    return type(module).__name__.endswith(("Norm", "NormBase")) or isinstance(module, nn.LayerNorm)


def select_trainable(model: nn.Module, mode: str, scales: bool = True) -> None:
    """Set ``requires_grad`` for `mode`; LoRA's is set by peft.

    full: everything but zero points, and but the scales where `scales` is False. scales: the scales and the norms, with
    codes frozen. A scale that trains is decoupled from the codes first.

    Raises:
        LlmqatError: if the mode is LoRA, and the model has no adapters.
    """
    if mode == "lora":
        if not any(parameter.requires_grad for parameter in adapter_parameters(model)):
            raise LlmqatError(
                "mode 'lora' trains adapters, and this model has none that train; call model = llmqat.add_lora(model) "
                "first, or train with mode='full' or mode='scales'"
            )
        return
    scales = scales or mode == "scales"
    for parameter in model.parameters():
        parameter.requires_grad_(mode == "full" and parameter.is_floating_point())
    for layer in (on_grid.layer for on_grid in quantized_layers(model)):
        if scales:
            layer.decouple_scale()
        layer.scale.requires_grad_(scales)
        for frozen in (layer.zero_point, layer.compensation_step):
            if frozen is not None:
                frozen.requires_grad_(False)
    for module in model.modules():
        if is_norm(module):
            module.requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def parameter_groups(model: nn.Module, mode: str, config: ResolvedTrain) -> list[dict[str, Any]]:
    """Optimizer groups of what trains: one per tensor, each with its own learning rate."""
    if mode == "lora":
        return [{"params": [p for p in model.parameters() if p.requires_grad], "lr": config.lr}]
    rates: dict[int, float] = {}
    for layer in (on_grid.layer for on_grid in quantized_layers(model)):
        step = float(layer.scale.detach().abs().median())
        rates[id(layer.weight)] = config.lr * step
        rates[id(layer.scale)] = (config.lr if mode == "scales" else config.lr_scale) * step
    groups = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            rate = rates.get(id(parameter))
            if rate is None:
                rate = config.lr_float * float(parameter.detach().square().mean().sqrt().clamp(min=1e-3))
            groups.append({"params": [parameter], "lr": rate})
    return groups
