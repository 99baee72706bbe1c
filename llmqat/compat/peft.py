"""Private names of peft: layers of one's own, and what it rewrites in families with experts."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from torch import Tensor, nn

from llmqat.compat.register import leans_on


@leans_on("peft.LoraConfig._register_custom_module", test="tests/train/test_modes.py")
def register_layers(config: LoraConfig, adapted: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Let peft adapt layers of one class by layers of another, which are no part of peft."""
    config._register_custom_module(dict(adapted))


@leans_on(
    "peft.tuners.tuners_utils._check_lora_target_modules_mamba",
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
    "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
    test="tests/train/test_expert_adapters.py",
)
@contextmanager
def reading_targets(targets: Callable[..., None], tensors: Callable[..., Mapping[str, Tensor]]) -> Iterator[None]:
    """Have peft take targets and adapters of families with experts as told, instead of rewriting them.

    It would make them targets of transformers' fused parameters, which a prepared model does not have any more: all
    layers of such a name, experts or not, would go without an adapter. And it refuses projections of state-space
    layers, whose weights kernels may read past the layer; no layer of a prepared model is read so.

    Args:
        targets: ``(config, model)``, changes the config.
        tensors: ``(tensors, model)``, returns those that layers of the model have, by their names in files.
    """
    from peft.tuners import tuners_utils
    from peft.utils import transformers_weight_conversion as conversion

    told: list[tuple[Any, str, Callable[..., Any]]] = [
        (tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None),
        (conversion, "convert_peft_config_for_transformers", lambda config, model, **_: targets(config, model)),
        (
            conversion,
            "convert_peft_adapter_state_dict_for_transformers",
            lambda model, adapter_state_dict, **_: tensors(adapter_state_dict, model),
        ),
    ]
    original = [(place, name, getattr(place, name)) for place, name, _ in told]
    try:
        for place, name, function in told:
            setattr(place, name, function)
        yield
    finally:
        for place, name, function in original:
            setattr(place, name, function)


@leans_on(
    "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
    test="tests/train/test_expert_adapters.py",
)
def lost_names(model: PeftModel, tensors: dict[str, Tensor]) -> list[str]:
    """Names in a file of adapters that peft alone takes for other ones, by which transformers' files call layers."""
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config = next(iter(model.peft_config.values()))
    return sorted(tensors.keys() - convert_peft_adapter_state_dict_for_transformers(model, config, tensors).keys())
