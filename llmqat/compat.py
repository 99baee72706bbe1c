"""Everything that llmqat leans on in transformers, peft, accelerate and torch and that is not public there.

`REGISTER` names each with its reason, the file that uses it and the test that fails first when it moves;
`tests/test_compat.py` holds it against the code and against the installed versions. Where there is a public door, it is
taken instead: `generate(custom_generate=...)`, subclasses of `Cache`, forward hooks.

The key-value cache is the argument and the output `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
`cache_name` reads the name from the model at hand, because code of a model may be older than the library around it.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llmqat.errors import LlmqatError

CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class Reliance:
    """One thing that is not public, or may be renamed.

    Attributes:
        name: dotted path of what must exist.
        why: what llmqat does with it.
        used_in: the file that uses it.
        test: the test that fails first when it moves.
    """

    name: str
    why: str
    used_in: str
    test: str


REGISTER = (
    Reliance(
        "transformers.PreTrainedModel._from_config",
        "makes a model of a class and a config, in a dtype and on meta",
        "llmqat/formats/skeleton.py",
        "tests/formats/test_reader.py",
    ),
    Reliance(
        "transformers.PreTrainedModel._tied_weights_keys",
        "emptied where the embedding looks up rows of the packed head: no weight is left to tie",
        "llmqat/formats/skeleton.py",
        "tests/formats/test_lm_head.py",
    ),
    Reliance(
        "transformers.PreTrainedModel._load_pretrained_model",
        "reads some tensors of a file into a model, renamed and converted as from_pretrained does",
        "llmqat/formats/partial.py",
        "tests/pipeline/test_low_memory.py",
    ),
    Reliance(
        "transformers.conversion_mapping.get_model_conversion_mapping",
        "names and layouts of a file against those of the model",
        "llmqat/formats/partial.py",
        "tests/pipeline/test_low_memory.py",
    ),
    Reliance(
        "transformers.core_model_loading.rename_source_key",
        "the name in the model of a tensor in a file",
        "llmqat/formats/partial.py",
        "tests/pipeline/test_low_memory.py",
    ),
    Reliance(
        "transformers.core_model_loading.WeightConverter",
        "tells conversions from renamings in that mapping",
        "llmqat/formats/partial.py",
        "tests/pipeline/test_low_memory.py",
    ),
    Reliance(
        "transformers.core_model_loading.WeightRenaming",
        "tells renamings from conversions in that mapping",
        "llmqat/formats/partial.py",
        "tests/pipeline/test_low_memory.py",
    ),
    Reliance(
        "transformers.modeling_utils.LoadStateDictConfig",
        "dtype and mapping of such a partial read",
        "llmqat/formats/partial.py",
        "tests/pipeline/test_low_memory.py",
    ),
    Reliance(
        "transformers.core_model_loading._weight_conversions",
        "emptied where experts were split: the model is saved as it is, not as it was loaded",
        "llmqat/models/experts.py",
        "tests/models/test_experts.py",
    ),
    Reliance(
        "transformers.PreTrainedModel._no_split_modules",
        "which modules are the blocks that sharded training wraps",
        "llmqat/train/sharding.py",
        "tests/test_distributed.py",
    ),
    Reliance(
        "transformers.utils.output_capturing",
        "its hooks stay in a model once hidden states were asked for; the native blocks may pass them by",
        "llmqat/compat.py",
        "tests/serve/test_forward.py",
    ),
    Reliance(
        "peft.utils.transformers_weight_conversion.convert_peft_config_for_transformers",
        "kept from rewriting targets of families with experts, for the length of a with",
        "llmqat/nn/lora.py",
        "tests/models/test_experts.py",
    ),
    Reliance(
        "peft.utils.transformers_weight_conversion.convert_peft_adapter_state_dict_for_transformers",
        "kept from rewriting adapters of families with experts, for the length of a with",
        "llmqat/nn/lora.py",
        "tests/models/test_experts.py",
    ),
    Reliance(
        "peft.tuners.tuners_utils.check_adapters_to_merge",
        "which adapters a merge is for",
        "llmqat/nn/lora.py",
        "tests/nn/test_lora.py",
    ),
    Reliance(
        "peft.LoraConfig._register_custom_module",
        "adapters inside the quantizer are a layer of llmqat's own",
        "llmqat/train/modes.py",
        "tests/train/test_modes.py",
    ),
    Reliance(
        "peft.tuners.lora.layer.LoraLayer._disable_adapters",
        "adapters off for the float view of a model",
        "llmqat/models/float_view.py",
        "tests/models/test_float_view.py",
    ),
    Reliance(
        "accelerate.state.AcceleratorState._reset_state",
        "a second run of one process may compute in another precision",
        "llmqat/train/together.py",
        "tests/train/test_together.py",
    ),
    Reliance(
        "accelerate.state.AcceleratorState._shared_state",
        "whether an earlier run of this process has left its state",
        "llmqat/train/together.py",
        "tests/train/test_together.py",
    ),
    Reliance(
        "torch._C._current_graph_task_id",
        "whether a forward runs again inside a backward, as gradient checkpointing does",
        "llmqat/nn/fake_quant_linear.py",
        "tests/nn/test_fake_quant_linear.py",
    ),
    Reliance(
        "torch.nn.Module._apply",
        "scales keep their dtype when a model is cast",
        "llmqat/nn/packed_linear.py",
        "tests/nn/test_packed_linear.py",
    ),
)


@functools.cache
def cache_name(forward: Callable[..., Any]) -> str | None:
    """The name under which `forward` takes a key-value cache; None if it takes none."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def cache_of(arguments: dict[str, Any]) -> Any:
    """The key-value cache among the keyword arguments of a call, under either name; None for none.

    Raises:
        LlmqatError: if two caches are given.
    """
    caches = [arguments[name] for name in CACHE_NAMES if arguments.get(name) is not None]
    if len(caches) > 1 and caches[0] is not caches[1]:
        raise LlmqatError("cache and past_key_values are two different caches; give one of them")
    return caches[0] if caches else None


def give_cache(forward: Callable[..., Any], arguments: dict[str, Any], cache: Any) -> None:
    """Let the keyword arguments of a call hold `cache`, under the one name that `forward` knows."""
    for name in CACHE_NAMES:
        arguments.pop(name, None)
    arguments[_known(cache_name(forward))] = cache


def generate_cache_name() -> str:
    """The name under which `generate` takes a key-value cache.

    Raises:
        LlmqatError: if it is none that llmqat knows.
    """
    from transformers import GenerationMixin

    return _known(cache_name(GenerationMixin.prepare_inputs_for_generation))


def refuse_unknown_caches(arguments: dict[str, Any]) -> None:
    """Refuse arguments that may be the past of a sequence, and that transformers would drop without a word.

    Raises:
        LlmqatError: if one is a cache, or has the name of one.
    """
    from transformers.cache_utils import Cache

    for name, value in arguments.items():
        flag = value is None or isinstance(value, bool)
        if isinstance(value, Cache) or (not flag and any(word in name for word in ("past", "cache", "key_value"))):
            raise LlmqatError(
                f"{name} is no argument of this model; give a key-value cache as {generate_cache_name()}, positions as "
                "position_ids"
            )


def _known(name: str | None) -> str:
    if name is None:
        import transformers

        raise LlmqatError(
            f"transformers {transformers.__version__} names its cache neither {' nor '.join(CACHE_NAMES)}; install a "
            "version that llmqat was tested with"
        )
    return name


def output_with_cache(hidden: Any, cache: Any) -> Any:
    """The output of a decoder stack: hidden states, and the cache under the name of this version of transformers."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast(hidden, **{_known(cache_name(BaseModelOutputWithPast)): cache})  # type: ignore[arg-type]


def max_length_of(layer: Any) -> int:
    """Tokens that a cache layer can hold; -1 for any number. Up to transformers 5.23 the method has another name."""
    length: int = (layer.get_max_length if hasattr(layer, "get_max_length") else layer.get_max_cache_shape)()
    return length


def captures_outputs(hook: Any) -> bool:
    """Whether a forward hook is one that transformers leaves in a model once hidden states were asked for.

    It does nothing until a call asks for them again, and such a call runs through transformers.
    """
    return getattr(hook, "__module__", "") == "transformers.utils.output_capturing"


def unknown_transformers() -> str:
    """Why the native path does not recognise the installed transformers; empty if it does."""
    import transformers
    from transformers import GenerationMixin
    from transformers.modeling_outputs import BaseModelOutputWithPast

    doors = (GenerationMixin.prepare_inputs_for_generation, BaseModelOutputWithPast)
    if any(cache_name(door) is None for door in doors):
        return f"transformers {transformers.__version__} names its cache neither {' nor '.join(CACHE_NAMES)}"
    if "custom_generate" not in inspect.signature(GenerationMixin.generate).parameters:
        return f"generate of transformers {transformers.__version__} takes no custom_generate"
    return ""
