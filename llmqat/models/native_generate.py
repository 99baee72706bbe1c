"""Token by token without the detours of `generate`: sampling on the native decoder.

transformers' own loop takes some milliseconds a token, and its operators wake torch's threads, which then spin on the
cores that the kernels need. This one calls the same logits processors and stopping criteria, on one thread.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import native
from llmqat.models.native_families import FAMILIES, cap_of
from llmqat.models.native_forward import decoder_of, reserve, rotary_tables, show, takes
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.packed_linear import PackedLinear

# Kinds of rotary embedding whose tables do not depend on how long the sequence is.
FIXED_ROPES = ("default", "linear", "llama3", "yarn")
# What `generate` hands its sampling loop for a plain text model.
PLAIN_INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


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
        cache = model_kwargs["past_key_values"]
        logits = self(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        with native.own_threads():
            step = Step(self, cache)
            while True:
                token = _choose(logits, input_ids, logits_processor, generation_config.do_sample)
                input_ids = torch.cat([input_ids, token], 1)
                if streamer is not None:
                    streamer.put(token[0])
                if stopping_criteria(input_ids, None).all():
                    break
                logits = step(token)
            show(step.buffers, cache)
        if streamer is not None:
            streamer.end()
        return input_ids


def _plain(model: Any, input_ids: Tensor, config: Any, inputs: dict[str, Any]) -> bool:
    """Whether this call asks for tokens only, from one unpadded prompt and an empty cache."""
    given = {name for name, value in inputs.items() if value is not None}
    cache = inputs.get("past_key_values")
    if cache is None or cache.get_seq_length() or not inputs.get("use_cache") or given - PLAIN_INPUTS:
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


def _choose(logits: Tensor, input_ids: Tensor, processors: Any, sample: bool) -> Tensor:
    """The next token ``(1, 1)``."""
    scores = processors(input_ids, logits.to(torch.float32, copy=True))
    if sample:
        return torch.multinomial(torch.softmax(scores, -1), 1)
    return torch.tensor([[scores[0].numpy().argmax()]])  # torch's own takes 25 times as long on one thread


def _head(module: Any) -> Callable[[Tensor], Tensor]:
    """What `module` computes for contiguous hidden states, without the operator's detours if it is packed."""
    if not isinstance(module, PackedLinear) or module.input_scale is not None or _hooked(module):
        return module
    runs = native.supports(module.weight_scale, module.weight_scale, module.in_features)
    return native.Layer(*module.arguments()).linear if runs else module


def _embed(module: Any) -> Callable[[Tensor], Tensor]:
    """What `module` looks up for token ids ``(n,)``, likewise."""
    if not isinstance(module, PackedEmbedding) or module.embed_scale is not None or _hooked(module):
        return module
    head: Any = module.head()
    runs = native.supports(head.weight_scale, head.weight_scale, head.in_features)
    same = head.weight_scale.dtype == module.compute.dtype
    return native.Layer(*head.arguments()).rows if runs and same else module


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


class Step:
    """One token through the model: what changes from call to call is its row of the embedding and its position."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.stack = model.model
        self.embed, self.head = _embed(self.stack.embed_tokens), _head(model.lm_head)
        self.decoder, self.buffers = decoder_of(self.stack), cache.llmqat_buffers
        config = self.stack.config
        self.cap = cap_of(config, FAMILIES[config.model_type].logits_cap)
        types = self.stack.rotary_emb.rope_type  # of each type of layer, or of all
        self.fixed = all(kind in FIXED_ROPES for kind in (types.values() if isinstance(types, dict) else [types]))
        self.tables: list[tuple[Tensor, Tensor]] = []

    def rotary(self, embeds: Tensor, position: int) -> list[tuple[Tensor, Tensor]]:
        """Rows of the rotary tables ``(1, dim)``, from tables for the whole buffer where those stay the same."""
        if not self.fixed:
            return rotary_tables(self.stack, embeds, torch.tensor([[position]]))
        if not self.tables or self.tables[0][0].shape[0] <= position:
            self.tables = rotary_tables(self.stack, embeds, torch.arange(self.buffers.capacity)[None])
        return [(cosine[position : position + 1], sine[position : position + 1]) for cosine, sine in self.tables]

    def __call__(self, token: Tensor) -> Tensor:
        """Logits ``(1, vocabulary)`` after `token` ``(1, 1)``, which the cache then holds."""
        past = self.buffers.length
        reserve(self.buffers, self.decoder, past + 1)
        embeds = self.embed(token[0])
        hidden = self.decoder(embeds, self.buffers, past, self.rotary(embeds[None], past))
        self.buffers.length = past + 1
        logits: Tensor = self.head(hidden)
        return torch.tanh(logits / self.cap) * self.cap if self.cap else logits
