"""Native sampling of several prompts at once: each has its own cache, and a step reads the weights once for all."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria

from llmqat.compat.caches import generate_cache_name
from llmqat.kernels import native
from llmqat.serve.cache_views import reserve, start_cache
from llmqat.serve.calls import lies_on_cpu, text_positions
from llmqat.serve.families import FAMILIES
from llmqat.serve.forward import why_not_native
from llmqat.serve.parts import side_inputs
from llmqat.serve.paths import counts_of
from llmqat.serve.stacks import stack_of
from llmqat.serve.step import Step, has_fixed_rotary


class BatchStep:
    """Runs one token of each of several sequences through the model.

    Args:
        step: of the model.
        caches: of the sequences, which were started natively.
    """

    def __init__(self, step: Step, caches: Sequence[Any]) -> None:
        self.step, self.buffers = step, [cache.llmqat_buffers for cache in caches]

    def __call__(self, tokens: Tensor, rows: Sequence[int]) -> Tensor:
        """Logits ``(n, vocabulary)`` after `tokens` ``(n,)`` of these sequences, whose caches then hold them."""
        step, held = self.step, [self.buffers[row] for row in rows]
        for buffers in held:
            reserve(buffers, step.decoder, buffers.length + 1)
        tokens = step.as_read(tokens)
        embeds = step.embed(tokens)
        side = side_inputs(step.stack, tokens[None], embeds[None])
        rotary = step.rotary(embeds[None], [buffers.length for buffers in held])
        hidden = step.decoder.together(embeds, held, rotary, side)
        for buffers in held:
            buffers.length += 1
        return step.logits(hidden)


def why_not_together(model: Any, ids: Tensor, mask: Any, positions: Any) -> str:
    """Why prompts ``(n, length)``, padded on the left, are not sampled natively together; empty if they are."""
    stack = stack_of(model)
    if FAMILIES[stack.config.model_type].mixer:
        return f"{len(ids)} sequences, and blocks that keep the state of one"
    if not has_fixed_rotary(stack):
        return f"{len(ids)} sequences, and rotary tables that depend on the length of one"
    given = torch.ones_like(ids) if mask is None else mask
    if not lies_on_cpu(given) or given.shape != ids.shape:
        return "a mask of one's own"
    seen = given.bool()
    if not bool(seen[:, -1].all()) or bool((seen[:, :-1] & ~seen[:, 1:]).any()):
        return "padding that is not on the left"
    positions = text_positions(stack, positions)
    if positions is not None:
        own = seen.cumsum(1) - 1
        if not lies_on_cpu(positions) or positions.shape != ids.shape or not torch.equal(positions[seen], own[seen]):
            return "positions are not ranges from 0"
    return why_not_native(stack, ids[:1], None, None, None)


def batch_loop(
    model: Any, ids: Tensor, mask: Tensor | None, choose: Callable[[Tensor, Tensor], Tensor], criteria: Any, config: Any
) -> Tensor:
    """Extend prompts `ids` ``(n, length)`` by the tokens that `choose` takes, until `criteria` have stopped all.

    As in the loop of transformers, padding follows a sequence that an end token has stopped. It is not computed.
    """
    lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
    prompts = (row[None, -length:] for row, length in zip(ids, lengths, strict=True))
    caches, started = zip(*(_prefill(model, prompt) for prompt in prompts), strict=True)
    logits, going = torch.cat(started), torch.ones(len(ids), dtype=torch.bool)
    padding = _padding(config) if any(type(one) is EosTokenCriteria for one in criteria) else None
    with native.own_threads():
        step = BatchStep(Step(model, caches[0]), caches)
        while True:
            tokens = choose(logits, ids)[:, 0]
            if padding is not None:
                tokens = torch.where(going, tokens, padding)
            ids = torch.cat([ids, tokens[:, None]], 1)
            going &= ~criteria(ids, None)
            if not going.any():
                return ids
            rows = (going if padding is not None else torch.ones_like(going)).nonzero()[:, 0]
            logits[rows] = step(tokens[rows], rows.tolist())
            counts_of(step.step.stack).loop_tokens += len(rows)


def _prefill(model: Any, ids: Tensor) -> tuple[Any, Tensor]:
    """A cache of one prompt ``(1, length)``, and the logits ``(1, vocabulary)`` after it."""
    cache = start_cache(stack_of(model))
    logits: Tensor = model(input_ids=ids, use_cache=True, logits_to_keep=1, **{generate_cache_name(): cache}).logits
    return cache, logits[:, -1]


def _padding(config: Any) -> int:
    """The token behind the end of a sequence: that of padding, or else the first that ends one."""
    ends = config.eos_token_id
    first = ends[0] if isinstance(ends, list) else ends
    return int(first if config.pad_token_id is None else config.pad_token_id)
