"""Attention of transformers' models in the tiles of the compiled kernels, while they train."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from llmqat.kernels.attention import Softmax, attend, fits, has_attention, seen_by_all, seen_by_mask

SDPA = "sdpa"


@contextmanager
def native_attention() -> Iterator[None]:
    """Let models whose config says "sdpa" attend in tiles, where this machine has them; torch takes what does not fit.

    The function of that name is another one meanwhile, in the whole process. Models and their configs stay as they are:
    nothing of this is saved with them, and code that asks for the name of their attention gets its answer.
    """
    before = AttentionInterface()[SDPA]
    if not has_attention() or isinstance(before, _InTiles):
        yield
        return
    AttentionInterface.register(SDPA, _InTiles(before))
    try:
        yield
    finally:
        AttentionInterface.register(SDPA, before)


class _InTiles:
    """An attention function of transformers. Calls that it does not take go to `other`."""

    def __init__(self, other: Any) -> None:
        self.other = other

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
    ) -> Any:
        cast = _cast(query, key, value)
        if cast is not None and _plain(options) and fits(*cast):
            causal = options.get("is_causal")
            seen = _seen(query, key, attention_mask, getattr(module, "is_causal", True) if causal is None else causal)
            if seen is not None:
                scale = options.get("scaling")
                return attend(*cast, Softmax(seen, query.shape[-1] ** -0.5 if scale is None else scale)), None
        return self.other(module, query, key, value, attention_mask, **options)


def _cast(*tensors: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """Query, key and value in bfloat16, as autocast leaves them to torch's attention; None if they are to be others."""
    if torch.compiler.is_compiling() or any(type(x) is not Tensor or x.device.type != "cpu" for x in tensors):
        return None
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16:
        tensors = tuple(x.to(torch.bfloat16) if x.dtype == torch.float32 else x for x in tensors)
    query, key, value = tensors
    return (query, key, value) if all(x.dtype == torch.bfloat16 for x in tensors) else None


def _plain(options: dict[str, Any]) -> bool:
    """Whether a call asks for nothing but a softmax of scaled scores."""
    scale = options.get("scaling")
    return (
        not options.get("dropout")
        and not options.get("output_attentions")
        and options.get("position_bias") is None
        and options.get("softcap") is None
        and (scale is None or scale > 0)
    )


def _seen(query: Tensor, key: Tensor, mask: Any, causal: bool) -> Tensor | None:
    """The keys that each query sees; None where they are no runs, or the mask says more than which they are."""
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        return seen_by_all(queries, keys, causal and queries > 1)
    if type(mask) is not Tensor or mask.dtype != torch.bool or mask.dim() != 4 or mask.device.type != "cpu":
        return None
    fitting = mask.shape[0] in (1, query.shape[0]) and mask.shape[1:] == (1, queries, keys)
    return seen_by_mask(mask) if fitting else None
