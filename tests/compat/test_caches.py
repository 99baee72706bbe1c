"""Caches are found and given under the name of every version of transformers, and nothing else passes for one."""

import pytest
import torch
from transformers import DynamicCache, Gemma4TextModel, LlamaModel

from llmqat.compat.caches import (
    CACHE_NAMES,
    cache_name,
    cache_of,
    generate_cache_name,
    give_cache,
    output_with_cache,
    refuse_unknown_caches,
)
from llmqat.errors import LlmqatError


def test_the_name_is_that_of_the_signature():
    assert cache_name(lambda cache=None: None) == "cache"
    assert cache_name(lambda ids, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda ids: None) is None
    assert generate_cache_name() in CACHE_NAMES


def test_a_cache_is_found_under_every_name():
    cache = DynamicCache()
    assert cache_of({"cache": cache}) is cache_of({"past_key_values": cache, "cache": None}) is cache
    assert cache_of({}) is None
    with pytest.raises(LlmqatError, match="cache and past_key_values are two different caches; give one of them"):
        cache_of({"cache": cache, "past_key_values": DynamicCache()})


def test_a_cache_is_given_under_one_name():
    arguments = {"past_key_values": 1, "use_cache": True}
    give_cache(lambda cache: None, arguments, 2)
    assert arguments == {"cache": 2, "use_cache": True}
    with pytest.raises(LlmqatError, match="names its cache neither cache nor past_key_values; install transformers>="):
        give_cache(lambda ids: None, {}, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory": DynamicCache()},
        {"cache_params": (1,)},
        {"past": torch.ones(1)},
        {"past_key_value": ()},
        {"cache_position": torch.arange(3)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_looks_like_a_cache_is_refused(arguments):
    with pytest.raises(LlmqatError, match=f"{next(iter(arguments))} is no argument of this model; give a key-value"):
        refuse_unknown_caches(arguments)
    refuse_unknown_caches({"return_legacy_cache": False, "output_attentions": True, "past": None})


def test_outputs_carry_the_cache():
    hidden, cache = torch.ones(1, 1, 2), DynamicCache()
    for stack in (LlamaModel, Gemma4TextModel):
        output = output_with_cache(stack.forward, hidden, cache)
        assert output.last_hidden_state is hidden
        assert output[generate_cache_name()] is cache
    assert output.shared_kv_states is None, "the class that Gemma 4 asks for it"
