"""The key-value cache of transformers, under the names that it has in the versions that llmqat runs on.

It is the argument and the output `past_key_values` up to transformers 5.23, and `cache` from 5.24 on. `cache_name`
reads the name from the model at hand, because code of a model may be older than the library around it.
"""

import functools
import inspect
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, get_args

from transformers import DynamicCache, GenerationMixin
from transformers.cache_utils import Cache, DynamicSlidingWindowLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from llmqat.compat.register import TESTED
from llmqat.errors import LlmqatError

CACHE_NAMES = ("cache", "past_key_values")
# What the native path reads and writes of a cache, and of its layers that forget and those that do not.
CACHE_PARTS = ("layers", "offloading", "update", "get_seq_length")
LAYER_PARTS = (
    "keys",
    "values",
    "is_initialized",
    "lazy_initialization",
    "is_sliding",
    "sliding_window",
    "cumulative_length",
    "record_past",
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
    return _known(cache_name(GenerationMixin.prepare_inputs_for_generation))


def refuse_unknown_caches(arguments: dict[str, Any]) -> None:
    """Refuse arguments that may be the past of a sequence, and that transformers would drop without a word.

    Raises:
        LlmqatError: if one is a cache, or has the name of one.
    """
    for name, value in arguments.items():
        flag = value is None or isinstance(value, bool)
        if isinstance(value, Cache) or (not flag and any(word in name for word in ("past", "cache", "key_value"))):
            raise LlmqatError(
                f"{name} is no argument of this model; give a key-value cache as {generate_cache_name()}, positions as "
                "position_ids"
            )


def _known(name: str | None) -> str:
    if name is None:
        raise LlmqatError(
            f"transformers {version('transformers')} names its cache neither {' nor '.join(CACHE_NAMES)}; install "
            f"transformers{TESTED['transformers']}, which llmqat was tested with"
        )
    return name


def output_with_cache(forward: Callable[..., Any], hidden: Any, cache: Any) -> Any:
    """The output of the forward of a decoder stack: hidden states, and the cache under the name that it has there."""
    kind = _output_of(forward)
    return kind(hidden, **{_known(cache_name(kind)): cache})


@functools.cache
def _output_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The class in which `forward` says that it returns hidden states and a cache."""
    said = inspect.signature(forward).return_annotation
    kinds = [kind for kind in (said, *get_args(said)) if inspect.isclass(kind) and issubclass(kind, ModelOutput)]
    return next((kind for kind in kinds if cache_name(kind)), BaseModelOutputWithPast)


def max_length_of(layer: Any) -> int:
    """Tokens that a cache layer can hold; -1 for any number. Up to transformers 5.23 the method has another name."""
    length: int = (layer.get_max_length if hasattr(layer, "get_max_length") else layer.get_max_cache_shape)()
    return length


def unknown_caches() -> str:
    """Why caches of the installed transformers are not those that llmqat knows; empty if they are."""
    doors = (GenerationMixin.prepare_inputs_for_generation, BaseModelOutputWithPast)
    if any(cache_name(door) is None for door in doors):
        return f"transformers {version('transformers')} names its cache neither {' nor '.join(CACHE_NAMES)}"
    known = ((DynamicCache(), CACHE_PARTS), (DynamicSlidingWindowLayer(sliding_window=1), LAYER_PARTS))
    lost = [f"{type(one).__name__}.{part}" for one, parts in known for part in parts if not hasattr(one, part)]
    return f"transformers {version('transformers')} has no {', '.join(lost)}" if lost else ""
