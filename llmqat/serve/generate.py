"""Token by token without the detours of `generate`: sampling on the native decoder.

transformers' own loop takes some milliseconds a token, and its operators wake torch's threads, which then spin on the
cores that the kernels need. This one calls the same logits processors and stopping criteria, on one thread.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from llmqat.compat import cache_of, generate_cache_name
from llmqat.kernels import native
from llmqat.serve.forward import show, takes
from llmqat.serve.step import GreedyStep, Step

# What `generate` hands its sampling loop for a plain text model.
PLAIN_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep"}


def accelerate_generate(model: Any) -> None:
    """Let `model.generate` sample natively: `accelerate_forward` has said that its blocks can run so."""
    model.__class__ = _sampling_natively(type(model))  # type: ignore[arg-type]  # a type is hashable


@functools.cache
def _sampling_natively(cls: type) -> type:
    return type(cls.__name__, (NativeSampling, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})


class NativeSampling:
    """Greedy and multinomial sampling of one sequence; everything else is left to transformers."""

    @torch.no_grad()
    def _sample(  # the loop that `generate` calls when everything has been prepared
        self: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        if synced_gpus or not _plain(self, input_ids, generation_config, model_kwargs):
            return super()._sample(  # type: ignore[misc]
                input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, **model_kwargs
            )
        cache = cache_of(model_kwargs)
        keywords = {generate_cache_name(): cache, "use_cache": True, "logits_to_keep": 1}
        logits = self(input_ids=input_ids, **keywords).logits[:, -1]
        sample = generation_config.do_sample
        with native.own_threads():
            step = Step(self, cache)
            foreseen = not sample and not logits_processor and _foreseen(stopping_criteria)
            greedy = GreedyStep.of(self, step) if foreseen else None
            try:
                if greedy is None:
                    choose = functools.partial(_choose, processors=logits_processor, sample=sample)
                    input_ids = _choose_all(step, choose, logits, input_ids, stopping_criteria, streamer)
                else:
                    input_ids = _follow(greedy, native.argmax(logits[0]), input_ids, stopping_criteria, streamer)
            finally:
                show(step.buffers, cache)
        if streamer is not None:
            streamer.end()
        return input_ids


def _plain(model: Any, input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> bool:
    """Whether this call asks for tokens only, from one unpadded prompt and an empty cache."""
    given = {name for name, value in inputs.items() if value is not None}
    cache = cache_of(inputs)
    if cache is None or cache.get_seq_length() or not inputs.get("use_cache"):
        return False
    if given - PLAIN_INPUTS - {generate_cache_name()}:
        return False
    if config.return_dict_in_generate or config.prefill_chunk_size is not None:
        return False
    positions = inputs.get("position_ids")
    if positions is not None and not torch.equal(positions[0], torch.arange(input_ids.shape[1])):
        return False
    if _changes_rotary(model, input_ids.shape[1], config.max_length):
        return False
    return takes(model.model, input_ids, inputs.get("attention_mask"), cache, None, {})


def _changes_rotary(model: Any, tokens: int, most: int) -> bool:
    """Whether "longrope" may go over to its factors for long sequences on the way: there Phi-3 drops its cache."""
    trained = getattr(model.config, "original_max_position_embeddings", most)
    return model.model.rotary_emb.rope_type == "longrope" and tokens <= trained < most


def _choose_all(
    step: Step, choose: Callable[[Tensor, Tensor], Tensor], logits: Tensor, ids: Tensor, criteria: Any, streamer: Any
) -> Tensor:
    """`ids` ``(1, n)`` and the tokens that `choose` takes, from `logits` on."""
    while True:
        token = choose(logits, ids)
        ids = torch.cat([ids, token], 1)
        if streamer is not None:
            streamer.put(token[0])
        if criteria(ids, None).all():
            return ids
        logits = step(token)


def _choose(logits: Tensor, input_ids: Tensor, processors: Any, sample: bool) -> Tensor:
    """The next token ``(1, 1)``."""
    scores = processors(input_ids, logits.to(torch.float32, copy=True))
    if sample:
        return torch.multinomial(torch.softmax(scores, -1), 1)
    return torch.tensor([[scores[0].numpy().argmax()]])  # torch's own takes 25 times as long on one thread


def _follow(step: GreedyStep, token: int, prompt: Tensor, criteria: Any, streamer: Any) -> Tensor:
    """`prompt` ``(1, n)``, `token` and those that follow; the criteria are asked when they may say something."""
    ids, quiet, ends = prompt[0].tolist(), _quiet_length(criteria), _end_tokens(criteria)
    while True:
        ids.append(token)
        if streamer is not None:
            streamer.put(torch.tensor([token]))
        if (token in ends or len(ids) > quiet) and criteria(torch.tensor([ids]), None).all():
            return torch.tensor([ids])
        token = step(token)


def _foreseen(criteria: Any) -> bool:
    """Whether it is known what `criteria` look at: the length and the last token."""
    return all(type(one) in (MaxLengthCriteria, EosTokenCriteria) for one in criteria)


def _quiet_length(criteria: Any) -> float:
    """Up to this length none of them stops, or warns of one that the model was not trained for."""
    lengths = [one for one in criteria if type(one) is MaxLengthCriteria]
    warned = [one.max_position_embeddings for one in lengths if one.max_position_embeddings is not None]
    return min([one.max_length - 1 for one in lengths] + warned, default=math.inf)


def _end_tokens(criteria: Any) -> set[int]:
    return {token for one in criteria if type(one) is EosTokenCriteria for token in one.eos_token_id.flatten().tolist()}
