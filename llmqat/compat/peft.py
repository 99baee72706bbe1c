"""Private names of peft: layers of one's own, and what it rewrites in families with experts."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from peft import LoraConfig
from torch import nn

from llmqat.compat.register import leans_on


@leans_on("peft.LoraConfig._register_custom_module", test="tests/train/test_modes.py")
def register_layers(config: LoraConfig, adapted: Mapping[type[nn.Module], type[nn.Module]]) -> None:
    """Let peft adapt layers of one class by layers of another, which are no part of peft."""
    config._register_custom_module(dict(adapted))


@leans_on(
    "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
    "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
    test="tests/train/test_modes.py",
)
@contextmanager
def targets_by_module() -> Iterator[None]:
    """Keep peft from rewriting targets and adapters of families with experts.

    It would make them targets of transformers' fused parameters, which a prepared model does not have any more: all
    layers of such a name, experts or not, would go without an adapter.
    """
    from peft.utils import transformers_weight_conversion

    unchanged = {
        "convert_peft_config_for_transformers": lambda *_, **__: None,
        "convert_peft_adapter_state_dict_for_transformers": lambda *_, adapter_state_dict, **__: adapter_state_dict,
    }
    original = {name: getattr(transformers_weight_conversion, name) for name in unchanged}
    try:
        for name, function in unchanged.items():
            setattr(transformers_weight_conversion, name, function)
        yield
    finally:
        for name, function in original.items():
            setattr(transformers_weight_conversion, name, function)
