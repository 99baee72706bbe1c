"""Native greedy search and sampling: token by token on the native decoder, without the overhead of transformers' loop.

transformers' own loop takes some milliseconds a token, and its operators wake torch's threads, which then spin on the
cores that the kernels need. This one calls the same logits processors and stopping criteria, on one thread. It is
plugged in where transformers takes a loop of one's own, ``generate(custom_generate=...)``.
"""

import functools
import math
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from llmqat.compat.caches import cache_of, generate_cache_name
from llmqat.kernels import native
from llmqat.serve.batch import batch_loop, why_not_together
from llmqat.serve.cache_views import sync_cache_views
from llmqat.serve.calls import is_range, text_positions
from llmqat.serve.forward import why_not_native
from llmqat.serve.paths import counts_of
from llmqat.serve.stacks import has_towers, stack_of, why_not_sampled
from llmqat.serve.step import GreedyStep, Step

# What `generate` hands a sampling loop for a plain text model, besides the cache.
PLAIN_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}
# Inputs of models with towers that say which tokens stand for what.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")
# Arguments of `generate` that a custom loop does not get, or that ask for another loop.
OTHER_LOOPS = ("custom_generate", "assistant_model", "synced_gpus", "tokenizer", "stop_strings")


class _NotNativeError(Exception):
    """The native loop leaves a call to transformers."""


def accelerate_generate(model: Any) -> None:
    """Let `model.generate` sample natively, for a model that `accelerate_forward` has accepted."""
    below = vars(model).get("generate")  # what starts an int8 cache
    model.generate = MethodType(functools.partial(_generate, getattr(below, "__func__", None)), model)


def _generate(below: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`generate` of transformers, with the native loop in it wherever that computes what was asked for."""
    generate = functools.partial(below or type(model).generate, model)
    counts, streamer = counts_of(stack_of(model)), kwargs.get("streamer")
    reason = why_not_sampled(model) or _why_other_loop(model, args, kwargs)
    if not reason:
        loop = functools.partial(_native_loop, streamer=streamer, own_cache=cache_of(kwargs) is None)
        try:
            return generate(*args, **{**kwargs, "streamer": None, "custom_generate": loop})
        except _NotNativeError as left:
            reason = str(left)
    counts.left_to_transformers(f"generate: {reason}", call=False)
    return generate(*args, **kwargs)


def _why_other_loop(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Why a call of `generate` asks for another loop than greedy search or sampling; empty if it asks for these."""
    if len(args) > 4:  # inputs, generation_config, logits_processor, stopping_criteria
        return "positional arguments"
    others = [name for name in OTHER_LOOPS if kwargs.get(name) not in (None, False)]
    if has_towers(model):  # before they run
        others += sorted(name for name, value in kwargs.items() if _is_of_tower(name, value))
    if others:
        return ", ".join(others)
    config = args[1] if len(args) > 1 else kwargs.get("generation_config")
    given = (config or model.generation_config, kwargs)
    return ", ".join(name for name in ("num_beams",) if any((_of(one, name) or 1) > 1 for one in given))


def _of(where: Any, name: str) -> Any:
    return where.get(name) if isinstance(where, dict) else getattr(where, name, None)


def _native_loop(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    streamer: Any = None,
    own_cache: bool = True,
    **model_kwargs: Any,
) -> Tensor:
    """`input_ids` ``(batch, n)`` and the tokens that follow: what `generate` calls once everything has been prepared.

    Raises:
        _NotNativeError: if the call asks for more than tokens, or its blocks cannot run natively.
    """
    several = len(input_ids) > 1
    reason = _why_not_plain(model, input_ids, generation_config, model_kwargs)
    if several and (streamer is not None or not own_cache):
        reason = f"{len(input_ids)} sequences, and a streamer or a cache of one's own"
    if reason:
        raise _NotNativeError(reason)
    sample = generation_config.do_sample
    if several:
        choose = functools.partial(_choose, processors=logits_processor, sample=sample)
        mask = model_kwargs.get("attention_mask")
        return batch_loop(model, input_ids, mask, choose, stopping_criteria, generation_config)
    if streamer is not None:
        streamer.put(input_ids)
    cache = cache_of(model_kwargs)
    keywords = {generate_cache_name(): cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(input_ids=input_ids, **keywords).logits[:, -1]
    with native.own_threads():
        step = Step(model, cache)
        plain = not sample and not logits_processor and _only_known_criteria(stopping_criteria)
        greedy = GreedyStep.of(model, step) if plain else None
        past = step.buffers.length
        try:
            if greedy is None:
                choose = functools.partial(_choose, processors=logits_processor, sample=sample)
                tokens = _general_loop(step, choose, logits, input_ids, stopping_criteria, streamer)
            else:
                tokens = _greedy_loop(greedy, native.argmax(logits[0]), input_ids, stopping_criteria, streamer)
        finally:
            sync_cache_views(step.buffers, cache)
            counts_of(step.stack).loop_tokens += step.buffers.length - past
    if streamer is not None:
        streamer.end()
    return tokens


def _why_not_plain(model: Any, input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> str:
    """Why the native loop does not run this call; empty if it asks for tokens only, from prompts padded on the left."""
    mode = config.get_generation_mode()
    if mode.value not in ("greedy_search", "sample"):
        return mode.value
    given = {name for name, value in inputs.items() if not (value is None or _is_of_text(name, value))}
    others = sorted(given - PLAIN_INPUTS - {generate_cache_name()})
    if others:
        return ", ".join(others)
    cache = cache_of(inputs)
    if cache is None or not inputs.get("use_cache"):
        return "no cache"
    if cache.get_seq_length():
        return "goes on in a filled cache"
    if config.return_dict_in_generate or config.prefill_chunk_size is not None:
        return "return_dict_in_generate or prefill_chunk_size"
    if len(input_ids) > 1:
        return why_not_together(model, input_ids, inputs.get("attention_mask"), inputs.get("position_ids"))
    stack = stack_of(model)
    positions = text_positions(stack, inputs.get("position_ids"))
    if positions is not None and not (is_range(positions, input_ids.shape[1]) and not positions[0, :1].any()):
        return "positions are not one range from 0"
    if _changes_rotary(stack, input_ids.shape[1], config.max_length):
        return "longrope goes over to its factors for long sequences"
    return why_not_native(stack, input_ids, inputs.get("attention_mask"), positions, cache)


def _is_of_text(name: str, value: Any) -> bool:
    """Whether an input of a model with towers says that all tokens are text, or has nothing that a tower encoded."""
    return value == {} if isinstance(value, dict) else name in TOKEN_TYPES and not value.any()


def _is_of_tower(name: str, value: Any) -> bool:
    """Whether an argument of `generate` is what a tower reads, or says which tokens stand for that."""
    plain = name in PLAIN_INPUTS or name in ("inputs", "input_ids", "inputs_embeds")
    return isinstance(value, Tensor) and not plain and not _is_of_text(name, value)


def _changes_rotary(stack: Any, tokens: int, most: int) -> bool:
    """Whether "longrope" may switch to its factors for long sequences on the way, where Phi-3 drops its cache."""
    trained = getattr(stack.config, "original_max_position_embeddings", most)
    return stack.rotary_emb.rope_type == "longrope" and tokens <= trained < most


def _general_loop(
    step: Step, choose: Callable[[Tensor, Tensor], Tensor], logits: Tensor, ids: Tensor, criteria: Any, streamer: Any
) -> Tensor:
    """Extend `ids` ``(1, n)`` by the tokens that `choose` takes, from `logits` on, until `criteria` stop it."""
    while True:
        token = choose(logits, ids)
        ids = torch.cat([ids, token], 1)
        if streamer is not None:
            streamer.put(token[0])
        if criteria(ids, None).all():
            return ids
        logits = step(token)


def _choose(logits: Tensor, input_ids: Tensor, processors: Any, sample: bool) -> Tensor:
    """The next tokens ``(batch, 1)``."""
    scores = processors(input_ids, logits.to(torch.float32, copy=True))
    if sample:
        return torch.multinomial(torch.softmax(scores, -1), 1)
    return torch.from_numpy(scores.numpy().argmax(1))[:, None]  # torch's own takes 25 times as long on one thread


def _greedy_loop(step: GreedyStep, token: int, prompt: Tensor, criteria: Any, streamer: Any) -> Tensor:
    """Extend `prompt` ``(1, n)`` by `token` and its greedy successors; criteria are called only where they can fire."""
    ids, unchecked, ends = prompt[0].tolist(), _first_length_to_check(criteria), _end_tokens(criteria)
    while True:
        ids.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        if (token in ends or len(ids) >= unchecked) and criteria(torch.tensor([ids]), None).all():
            return torch.tensor([ids])
        token = step(token)


def _only_known_criteria(criteria: Any) -> bool:
    """Whether all `criteria` look at nothing but the length and the last token."""
    return all(type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in criteria)


def _first_length_to_check(criteria: Any) -> float:
    """Shortest length at which a stopping criterion can fire, or warn of one that the model was not trained for."""
    lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
    warned = [one.max_position_embeddings for one in lengths if one.max_position_embeddings is not None]
    return min([one.max_length for one in lengths] + [length + 1 for length in warned], default=math.inf)


def _end_tokens(criteria: Any) -> set[int]:
    return {token for one in criteria if type(one) is EosTokenCriteria for token in one.eos_token_id.flatten().tolist()}
