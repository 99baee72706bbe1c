"""One token through a model whose blocks are native: to its logits, or straight to the token that follows."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.compat.torch import hooks_of
from llmqat.kernels import native
from llmqat.kernels.decoder import CAPACITY_GROWTH, NativeDecoder
from llmqat.kernels.greedy import GreedyDecoder
from llmqat.kernels.packed import Packed
from llmqat.models.output_head import AFTER_HEAD
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.blocks import decoder_of, fits_shape, mixing_of, rotary_tables
from llmqat.serve.cache_views import reserve
from llmqat.serve.families import FAMILIES
from llmqat.serve.parts import side_inputs
from llmqat.serve.stacks import around, read_as, stack_of

# Kinds of rotary embedding whose tables do not depend on how long the sequence is.
FIXED_ROPES = ("default", "linear", "llama3", "yarn", "ntk_alpha", "proportional")


def _packed_head(module: Any) -> Packed | None:
    """Kernel arguments of a packed output head; None if it is float, has hooks, or has an unsupported layout."""
    if not isinstance(module, PackedLinear) or module.input_scale is not None or _hooked(module):
        return None
    if not fits_shape(module, module.out_features):
        return None
    runs = native.supports(module.weight_scale, module.weight_scale, module.in_features)
    return module.packed if runs else None


def _packed_rows(module: Any) -> Packed | None:
    """Kernel arguments of a packed embedding (the codes of the tied head), or None."""
    if not isinstance(module, PackedEmbedding) or module.embed_scale is not None or _hooked(module):
        return None
    head: Any = module.head()
    return head.packed if native.supports(head.weight_scale, head.weight_scale, head.in_features) else None


def _rows(module: Any, dtype: torch.dtype) -> Packed | Tensor | None:
    """Kernel arguments of a packed embedding, or the float table, that looks up rows of `dtype`; None for others."""
    packed = _packed_rows(module)
    if packed is not None:
        return packed if module.compute.dtype == dtype else None
    if type(module) is not nn.Embedding or module.max_norm is not None or _hooked(module):
        return None
    weight = module.weight
    return weight if weight.dtype == dtype and weight.device.type == "cpu" and weight.is_contiguous() else None


def _hooked(module: Any) -> bool:
    return any(hooks_of(module))


def _head(module: Any) -> Callable[[Tensor], Tensor]:
    """A function from contiguous hidden states to logits: the kernel itself where the head is packed."""
    packed = _packed_head(module)
    return module if packed is None else native.Layer(packed).linear


def _embed(module: Any) -> Callable[[Tensor], Tensor]:
    """A function from token ids ``(n,)`` to embeddings: the kernel itself where the embedding is packed."""
    packed = _packed_rows(module)
    return module if packed is None or packed.scale.dtype != module.compute.dtype else native.Layer(packed).rows


def has_fixed_rotary(stack: Any) -> bool:
    """Whether no rotary table of a decoder stack depends on how long the sequence is."""
    types = stack.rotary_emb.rope_type  # of each type of layer, or of all
    return all(kind in FIXED_ROPES for kind in (types.values() if isinstance(types, dict) else [types]))


class Step:
    """Runs one token through the model; from call to call only its row of the embedding and its position change."""

    def __init__(self, model: Any, cache: Any) -> None:
        self.stack = stack_of(model)
        self.embed, self.head = _embed(self.stack.embed_tokens), _head(model.get_output_embeddings())
        decoder = decoder_of(self.stack)
        assert isinstance(decoder, NativeDecoder), "the prefill before it ran natively"
        self.decoder, self.buffers, self.mixing = decoder, cache.llmqat_buffers, mixing_of(self.stack, cache)
        config = self.stack.config
        known = around(model)
        assert known is not None, "the loop asked for it"
        self.after_head = FAMILIES[config.model_type].after_head if known.follows_head else ""
        self.read_as = read_as(model)
        self.after_value = getattr(config, self.after_head) if self.after_head else None
        self.fixed = has_fixed_rotary(self.stack)
        self.tables: list[tuple[Tensor, Tensor]] = []

    def rotary(self, embeds: Tensor, positions: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        """Rows of the rotary tables ``(n, dim)`` at these positions, from long tables where those stay the same."""
        if not self.fixed:
            return rotary_tables(self.stack, embeds, torch.tensor([positions]))
        if not self.tables or len(self.tables[0][0]) <= max(positions):
            self.tables = self.all_rotary(embeds, 2 * max(positions) + CAPACITY_GROWTH)
        index = torch.tensor(positions)
        return [(cosine[index], sine[index]) for cosine, sine in self.tables]

    def all_rotary(self, like: Tensor, tokens: int) -> list[tuple[Tensor, Tensor]]:
        """The rotary tables ``(tokens, dim)`` of the first positions, of the dtype of `like`."""
        return rotary_tables(self.stack, like, torch.arange(tokens)[None])

    def __call__(self, token: Tensor) -> Tensor:
        """Logits ``(1, vocabulary)`` after `token` ``(1, 1)``, which the cache then holds."""
        past, token = self.buffers.length, self.as_read(token)
        reserve(self.buffers, self.decoder, past + 1)
        embeds = self.embed(token[0])
        side = side_inputs(self.stack, token, embeds[None])
        hidden = self.decoder(embeds, self.buffers, past, self.rotary(embeds[None], [past]), side, self.mixing)
        self.buffers.length = past + 1
        return self.logits(hidden)

    def as_read(self, tokens: Tensor) -> Tensor:
        """The tokens that the model reads in the place of these, in their shape."""
        if not self.read_as:
            return tokens
        return torch.tensor([self.read_as.get(token, token) for token in tokens.flatten().tolist()]).view(tokens.shape)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``(n, vocabulary)`` of hidden states ``(n, hidden)``."""
        logits: Tensor = self.head(hidden)
        return logits if self.after_value is None else AFTER_HEAD[self.after_head](logits, self.after_value)

    @property
    def keeps_order(self) -> bool:
        """Whether what follows the head leaves the order of the logits, ties included: nothing, or a power of two."""
        value = self.after_value
        return value is None or (self.after_head == "logits_scaling" and value > 0 and math.frexp(value)[0] == 0.5)


class GreedyStep:
    """A `Step` and the choice of the largest logit, in one call of the library.

    Whatever Python does between two tokens is slow: the weights have just swept its memory out of the processor's
    caches.
    """

    def __init__(self, step: Step, greedy: GreedyDecoder) -> None:
        self.step, self.greedy, self.buffers, self.room = step, greedy, step.buffers, 0

    @classmethod
    def of(cls, model: Any, step: Step) -> "GreedyStep | None":
        """The greedy step of `model` behind its `step`; None where its ends, logits or positions are not covered."""
        head = _packed_head(model.get_output_embeddings())
        embedding = _rows(step.stack.embed_tokens, step.decoder.dtype)
        if head is None or embedding is None or not step.keeps_order or not step.fixed:
            return None
        if step.decoder.shape.side or step.read_as:
            return None
        rows = embedding if isinstance(embedding, Tensor) else embedding.codes
        return cls(step, GreedyDecoder(step.decoder, embedding, head)) if len(rows) >= len(head.codes) else None

    def __call__(self, token: int) -> int:
        """The token after `token`, which the cache then holds."""
        past = self.buffers.length
        if past >= self.room:
            self._make_room(past + 1)
        following = self.greedy(token, past)
        self.buffers.length = past + 1
        return following

    def _make_room(self, tokens: int) -> None:
        reserve(self.buffers, self.step.decoder, tokens)
        like = torch.empty(0, dtype=self.step.decoder.dtype)
        tables = self.step.all_rotary(like, self.buffers.capacity)
        self.greedy.set_cache(self.buffers, tables, self.step.mixing)
        self.room = self.buffers.capacity
