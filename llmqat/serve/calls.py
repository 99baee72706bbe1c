"""Whether a call of a decoder stack is what the native decoder computes: one unpadded sequence without gradients."""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch import Tensor

from llmqat.kernels.decoder import UNLIMITED
from llmqat.serve.cache_views import why_cache_unfit
from llmqat.serve.families import FAMILIES, SIDE_ARGUMENT
from llmqat.serve.parts import last_norm, side_features, window_of

FLAGS = ("output_attentions", "output_hidden_states", "return_legacy_cache", "return_shared_kv_states")


def why_call_unfit(stack: Any, given: Tensor | None, cache: Any, kwargs: dict[str, Any]) -> str:
    """Why ids ``(1, m)`` or embeddings ``(1, m, hidden)`` cannot run natively, apart from mask and positions."""
    if not lies_on_cpu(given) or given.ndim not in (2, 3):
        return "the inputs are not ids or embeddings on the CPU"
    if given.shape[0] != 1 or given.shape[1] == 0:
        return f"a batch of {given.shape[0]} sequences of {given.shape[1]} tokens"
    if given.ndim == 3 and (given.dtype != last_norm(stack).weight.dtype or given.shape[2] != stack.config.hidden_size):
        return "embeddings of another dtype or width than the model's"
    if stack.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return "training, gradients, or torch.compile"
    if any(kwargs.get(name) for name in FLAGS) or kwargs.get("return_dict") is False:
        return "attention weights, hidden states of all blocks, or tuples were asked for"
    side = SIDE_ARGUMENT if side_features(stack.config, FAMILIES[stack.config.model_type]) else ""
    others = [name for name, value in kwargs.items() if not (value is None or isinstance(value, bool | int | str))]
    others = [name for name in others if name != side]
    return f"blocks read {', '.join(others)} too" if others else why_cache_unfit(stack, cache)


def why_past_unfit(stack: Any, given: Tensor | None, mask: Any, positions: Any, cache: Any) -> str:
    """Why mask or positions are more than one unpadded sequence behind what the cache holds."""
    assert given is not None
    tokens, past = given.shape[1], 0 if cache is None else cache.get_seq_length()
    masks = () if mask is None else _masks(stack, mask)
    if not all(sees_what_came(part, tokens, past, window) for part, window in masks):
        return "padding, or a mask of one's own"
    # Positions that start again separate packed sequences, which then do not see each other.
    return "" if positions is None or is_range(positions, tokens) else "positions are not one range"


def _masks(stack: Any, mask: Any) -> Iterator[tuple[Any, int]]:
    """The masks of the blocks, which are one or one for each type of layer, and how many tokens a query sees there."""
    family, kinds = FAMILIES[stack.config.model_type], getattr(stack.config, "layer_types", None)
    windows = [window_of(layer, family) or UNLIMITED for layer in stack.layers]
    if isinstance(mask, dict) and kinds is not None:
        pairs = set(zip(kinds, windows, strict=True))
        return ((mask.get(kind), window) for kind, window in pairs)
    return ((mask, window) for window in set(windows))


def sees_what_came(mask: Any, tokens: int, past: int, window: int) -> bool:
    """Whether a mask lets each new token see itself and what came before it, in its window, and nothing else."""
    if mask is None:
        return True
    if not lies_on_cpu(mask) or mask.shape[0] != 1 or mask.ndim not in (2, 4):
        return False
    if mask.ndim == 2:
        return mask.shape[1] == past + tokens and bool(mask.all())
    forgotten = past + tokens - mask.shape[3]  # by a cache that keeps a window
    if mask.shape[1:3] != (1, tokens) or not 0 <= forgotten <= max(0, past + 1 - window):
        return False
    queries, keys = torch.arange(past, past + tokens)[:, None], torch.arange(forgotten, past + tokens)
    seen = (keys <= queries) & (queries - keys < window)
    if mask.dtype != torch.bool:
        seen = torch.where(seen, 0.0, torch.finfo(mask.dtype).min).to(mask.dtype)
    return torch.equal(mask[0, 0], seen)


def text_positions(stack: Any, positions: Any) -> Any:
    """Positions ``(1, m)`` of text in the place of those by time, height and width ``(3, 1, m)``, where all agree, as
    they do in text; others as they are."""
    by_axis = FAMILIES[stack.config.model_type].positions_by_axis and lies_on_cpu(positions) and positions.ndim == 3
    return positions[0] if by_axis and bool((positions == positions[:1]).all()) else positions


def is_range(positions: Any, tokens: int) -> bool:
    """Whether positions are ``(1, tokens)``, each by one more than that before it."""
    plain = lies_on_cpu(positions) and positions.shape == (1, tokens) and positions.dtype != torch.bool
    return plain and bool((positions[0, 1:] - positions[0, :-1] == 1).all())


def lies_on_cpu(value: Any) -> TypeGuard[Tensor]:
    """Whether a value is a dense tensor on the CPU."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided
