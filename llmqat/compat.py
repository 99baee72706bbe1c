"""What transformers changed between the versions that llmqat runs on, in one place.

The key-value cache is the argument and the output `past_key_values` up to transformers 5.23, and `cache` from 5.24 on.
`cache_name` reads the name from the model at hand, because code of a model may be older than the library around it.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from llmqat.errors import LlmqatError

CACHE_NAMES = ("cache", "past_key_values")


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
    """What a decoder stack returns: hidden states, and the cache under the name of this version of transformers."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    return BaseModelOutputWithPast(hidden, **{_known(cache_name(BaseModelOutputWithPast)): cache})  # type: ignore[arg-type]
