"""Runs the blocks of packed Llama-like models in the native decoder, inside the ordinary transformers model.

`accelerate_forward` replaces the forward of the decoder stack. What it does not cover - batches, padding, gradients,
attention weights, caches of another kind - goes through the transformers code as before, on the same weights and the
same cache: its layers hold views of the buffers that the native code writes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.compat.caches import cache_name, cache_of, output_with_cache, refuse_unknown_caches
from llmqat.kernels.decoder import NativeDecoder, Rotary
from llmqat.kernels.mixing import Mixing
from llmqat.serve.blocks import decoder_of, mixing_of, rotary_fits, rotary_tables, why_not_covered
from llmqat.serve.cache_views import (
    buffers_of,
    is_synced,
    read_cache,
    reserve,
    start_cache,
    sync_cache_views,
    uses_int8_cache,
)
from llmqat.serve.calls import text_positions, why_call_unfit, why_past_unfit
from llmqat.serve.families import SIDE_ARGUMENT
from llmqat.serve.parts import side_inputs
from llmqat.serve.paths import counts_of
from llmqat.serve.stacks import stack_of


def accelerate_forward(model: PreTrainedModel) -> bool:
    """Let `model` run its blocks natively where it can; False, and nothing changed, where it never can."""
    stack = stack_of(model)
    why_not = why_not_covered(model, stack)
    counts = counts_of(stack if stack is not None else model)
    counts.native, counts.why_not = not why_not, why_not
    if why_not or stack is None:
        return False
    stack.forward = MethodType(_forward, stack)
    return True


@contextmanager
def through_transformers(model: PreTrainedModel) -> Iterator[None]:
    """Leave the blocks of a model, and so its sampling, to the code of transformers until the ``with`` ends."""
    stack = stack_of(model)
    own = {} if stack is None else vars(stack)
    forward = own.pop("forward", None)
    try:
        yield
    finally:
        if forward is not None:
            own["forward"] = forward


def _forward(
    self: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cache: Any = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    past_key_values: Any = None,
    **kwargs: Any,
) -> Any:
    """The forward of the decoder stack, which takes the cache under the names of all versions of transformers."""
    cache = cache_of({"cache": cache, "past_key_values": past_key_values})
    refuse_unknown_caches(kwargs)
    given = input_ids if inputs_embeds is None else inputs_embeds
    side = kwargs.get(SIDE_ARGUMENT)
    ambiguous = (input_ids is None) == (inputs_embeds is None) or not (input_ids is None or side is None)
    why_not = "not exactly one of ids and embeddings" if ambiguous else why_call_unfit(self, given, cache, kwargs)
    text = text_positions(self, position_ids)
    why_not = why_not or why_past_unfit(self, given, attention_mask, text, cache)
    decoder = why_not or decoder_of(self)
    if isinstance(decoder, NativeDecoder) and given is not None:
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = start_cache(self)
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + embeds.shape[1])[None] if text is None else text
        tables = rotary_tables(self, embeds, positions)
        if rotary_fits(self, tables, embeds.shape[1]):
            counts_of(self).native_calls += 1
            side = side_inputs(self, input_ids, embeds, side)
            hidden = _run(self, decoder, embeds, cache, (tables, side, mixing_of(self, cache)))
            return output_with_cache(type(self).forward, hidden, cache)
        decoder = "rotary embeddings rotate more features than a head has"
    counts_of(self).left_to_transformers(str(decoder))
    return type(self).forward(
        self,
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        inputs_embeds=inputs_embeds,
        use_cache=use_cache,
        **{str(cache_name(type(self).forward)): cache},
        **kwargs,
    )


def _run(
    stack: Any, decoder: NativeDecoder, embeds: Tensor, cache: Any, beside: tuple[Rotary, Tensor | None, Mixing | None]
) -> Tensor:
    """Hidden states ``(1, m, hidden)`` after the last norm; `cache` then holds the new tokens too."""
    tokens, past = embeds.shape[1], 0 if cache is None else cache.get_seq_length()
    buffers = buffers_of(cache, decoder, uses_int8_cache(stack))
    synced = cache is None or is_synced(buffers, cache, past)
    reserve(buffers, decoder, past + tokens)
    if not synced and past:
        read_cache(buffers, cache, past)
    hidden = decoder(embeds[0], buffers, past, *beside)
    if cache is not None:
        buffers.length = past + tokens
        sync_cache_views(buffers, cache)
        cache.llmqat_buffers = buffers
    return hidden[None]


def why_not_native(stack: Any, ids: Tensor | None, mask: Tensor | None, positions: Tensor | None, cache: Any) -> str:
    """Why this call cannot run natively; empty for one unpadded sequence without gradients, hidden states only."""
    why_not = "" if "forward" in vars(stack) else "the blocks are left to transformers"
    why_not = why_not or why_call_unfit(stack, ids, cache, {})
    why_not = why_not or why_past_unfit(stack, ids, mask, positions, cache)
    decoder = why_not or decoder_of(stack)
    return "" if isinstance(decoder, NativeDecoder) else decoder
