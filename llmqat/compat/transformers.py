"""Private names of transformers: how a model is made, read in parts, tied and saved, and the hooks it gets."""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from llmqat.compat.register import leans_on
from llmqat.compat.torch import with_parameters


@leans_on("transformers.PreTrainedModel._from_config", test="tests/formats/test_skeleton.py")
def model_from_config(kind: type[PreTrainedModel], config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """A model of a class and a config, in a dtype; on the meta device under `init_empty_weights`."""
    model: PreTrainedModel = kind._from_config(config, dtype=dtype)
    return model


@leans_on("transformers.PreTrainedModel._tied_weights_keys", test="tests/formats/test_lm_head.py")
def forget_ties(model: PreTrainedModel) -> None:
    """Leave `tie_weights`, which other libraries call too, nothing to tie."""
    model._tied_weights_keys = {}


@leans_on("transformers.core_model_loading._weight_conversions", test="tests/models/test_experts.py")
def save_as_it_is(model: PreTrainedModel) -> None:
    """Let `save_pretrained` of a model write its own names and layouts, not those of the files that it was loaded from.

    Its argument ``save_original_format=False`` says the same, but others (a Trainer) call it without.
    """
    model._weight_conversions = []  # type: ignore[assignment]


@leans_on(
    "transformers.conversion_mapping.get_model_conversion_mapping",
    "transformers.core_model_loading.WeightConverter",
    "transformers.core_model_loading.WeightRenaming",
    "transformers.core_model_loading.rename_source_key",
    test="tests/pipeline/test_low_memory.py",
)
def names_in_model(model: PreTrainedModel, keys: Iterable[str], apart: bool) -> dict[str, tuple[str, bool]]:
    """Name of a tensor in a file -> its name in a model, and whether its values are converted on the way.

    Experts that files hold apart stay so if `apart`, under the names that modules have, but for the last.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [
        entry for entry in mapping if isinstance(entry, WeightConverter) and not (apart and _reads_apart(entry))
    ]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, tuple[str, bool]] = {}
    for key in keys:
        own, pattern = rename_source_key(key, renamings, converters, prefix, state)
        found[key] = (key, False) if own not in state and key in state else (own, pattern is not None)
    return found


@leans_on("transformers.PreTrainedModel._init_weights", test="tests/models/test_replaceable.py")
def makes_weights(method: str) -> bool:
    """Whether a method of this name makes and fills weights, so that reading them is no use of them."""
    return method in ("__init__", "_init_weights")


@leans_on("transformers.utils.output_capturing", test="tests/serve/test_forward.py", native=True)
def captures_outputs(hook: Any) -> bool:
    """Whether a forward hook is one that transformers leaves in a model once hidden states were asked for.

    It does nothing until a call asks for them again, and such a call runs through transformers.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


@leans_on("transformers.integrations.moe._default_apply_gate", test="tests/models/test_experts.py")
def has_default_gate(fused: nn.Module) -> bool:
    """Whether fused experts compute ``act(gate) * up``, or ``act(up)``, between their projections, and nothing else."""
    from transformers.integrations.moe import _default_apply_gate

    return getattr(type(fused), "_apply_gate", _default_apply_gate) is _default_apply_gate


@leans_on("transformers.integrations.moe.use_experts_implementation", test="tests/nn/test_experts.py")
def by_plain_torch(fused: nn.Module, parameters: dict[str, nn.Parameter]) -> Any:
    """Fused experts of the kind of `fused` with other Parameters, that run by the code of their class itself."""
    other: Any = with_parameters(fused, parameters)
    if hasattr(other, "config"):
        other.config = copy.copy(other.config)
        other.config._experts_implementation = "eager"
    return other


def gate_of(fused: nn.Module) -> Any:
    """The way in which fused experts put gate and up together, without their Parameters."""
    return by_plain_torch(fused, {})._apply_gate


@leans_on(
    "transformers.conversion_mapping.get_model_conversion_mapping",
    "transformers.core_model_loading.WeightConverter",
    "transformers.quantizers.base.MODULES_TO_PATCH_FOR_QUANTIZATION",
    test="tests/models/test_experts.py",
)
def expert_names(model: PreTrainedModel) -> dict[str, str]:
    """Names in files of an expert's projections, by ``gate_proj``, ``up_proj`` and ``down_proj``; empty where files
    hold the experts of a block in one tensor."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    if any(type(module).__name__ in MODULES_TO_PATCH_FOR_QUANTIZATION for module in model.modules()):
        return {name: name for name in ("gate_proj", "up_proj", "down_proj")}  # apart wherever they are quantized
    names: dict[str, str] = {}
    for entry in get_model_conversion_mapping(model):
        for target in entry.target_patterns if isinstance(entry, WeightConverter) and _reads_apart(entry) else ():
            last = target.rpartition(".")[2]
            own = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            files = [source.removesuffix(".weight").rpartition(".")[2] for source in entry.source_patterns]
            if last in ("gate_up_proj", "up_proj", "down_proj") and len(files) == len(own):
                names |= dict(zip(own, files, strict=True))
    return names if names.keys() >= {"up_proj", "down_proj"} else {}


def _reads_apart(converter: Any) -> bool:
    """Whether a `WeightConverter` reads a tensor of each expert."""
    return all(".experts.*." in f".{source}" for source in converter.source_patterns)
