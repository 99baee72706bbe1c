"""Keeps a cache of transformers and the buffers of the native decoder one and the same memory."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llmqat.kernels.decoder import CacheBuffers, NativeDecoder
from llmqat.nn.kv_cache import quantizes_kv
from llmqat.serve.families import FAMILIES
from llmqat.serve.int8_cache import Int8Cache, Int8Layer
from llmqat.serve.parts import attention_of, first_attention, heads_of, keys_of, last_norm, window_of

PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def uses_int8_cache(stack: Any) -> bool:
    """Whether a cache that `stack` starts holds int8 codes."""
    return quantizes_kv(first_attention(stack))


def start_cache(stack: Any) -> Any:
    """An empty cache of the kind that `stack` starts."""
    return (Int8Cache if uses_int8_cache(stack) else DynamicCache)(config=stack.config)


def why_cache_unfit(stack: Any, cache: Any) -> str:
    """Why the native decoder cannot go on in `cache`: another kind, or another content than it would write."""
    if cache is None:
        return ""
    if type(cache) not in (DynamicCache, Int8Cache) or getattr(cache, "offloading", False):
        return f"a {type(cache).__name__} is not stored natively"
    if (type(cache) is Int8Cache) != uses_int8_cache(stack):
        return "keys and values are quantized, but stored as floats, or the other way round"
    family, sources = FAMILIES[stack.config.model_type], keys_of(stack)
    empty = [] if family.mixer else [0]  # transformers makes layers for attention alone
    if len(cache.layers) not in [len(stack.layers), len(sources) - sources[::-1].index(None), *empty]:
        return f"the cache has {len(cache.layers)} layers for {len(stack.layers)} blocks"
    past, dtype = cache.get_seq_length(), last_norm(stack).weight.dtype
    for layer, block, source in zip(cache.layers, stack.layers, sources, strict=False):
        if source is not None or attention_of(block, family) is None:
            continue
        plain = layer.codes if isinstance(layer, Int8Layer) else layer
        if type(plain) not in PLAIN_LAYERS or layer.get_seq_length() != past:
            return "the layers of the cache differ from those that the model starts"
        if plain.is_sliding and plain.sliding_window != window_of(block, family):
            return "the cache forgets at another length than the attention"
        heads = heads_of(block, stack.config)
        if past and not _holds_one_sequence(plain, heads, None if plain is not layer else dtype):
            return "the cache holds another batch, shape, dtype or device than this call"
    return ""


def _holds_one_sequence(layer: Any, heads: tuple[int, int], dtype: Any) -> bool:
    keys, values = layer.keys, layer.values
    return all(
        held.ndim == 4
        and (held.shape[0], held.shape[1], held.shape[3]) == (1, *heads)
        and held.device.type == "cpu"
        and dtype in (None, held.dtype)
        for held in (keys, values)
    )


def buffers_of(cache: Any, decoder: NativeDecoder, int8: bool) -> CacheBuffers:
    """The buffers behind `cache`; new ones where it has none, or some of another model or dtype."""
    known = getattr(cache, "llmqat_buffers", None)
    return known if known is not None and known.int8 == int8 and decoder.fits(known) else CacheBuffers(int8)


def reserve(buffers: CacheBuffers, decoder: NativeDecoder, tokens: int) -> None:
    """Have room for `tokens` tokens of `decoder`."""
    buffers.grow(decoder.caches, decoder.dtype, tokens)


def is_synced(buffers: CacheBuffers, cache: Any, length: int) -> bool:
    """Whether `cache` still holds the views of `buffers` that it was given, `length` tokens of them."""
    if buffers.length != length or len(cache.layers) < buffers.depth:
        return False
    return all(
        held.keys is not None
        and held.keys.data_ptr() == keys.data_ptr()
        and held.values.data_ptr() == values.data_ptr()
        and held.keys.shape == keys.shape
        for held, keys, values in _views(buffers, cache)
    )


def _pairs(buffers: CacheBuffers, cache: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Cache layers of transformers, and the buffers for their keys and values."""
    for layer, block, shape in zip(cache.layers, buffers.blocks, buffers.shapes, strict=False):
        if not shape.stores:
            continue
        halves = (layer.codes, layer.scales) if isinstance(layer, Int8Layer) else (layer,)
        for held, (k, v) in zip(halves, block, strict=True):
            yield held, k, v


def _views(buffers: CacheBuffers, cache: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Cache layers, and the keys and values ``(1, kv_heads, tokens, width)`` that each holds of what is filled.

    That is the last tokens in a window, and all in other layers, and in a window that records the past.
    """
    for held, k, v in _pairs(buffers, cache):
        forgets = held.is_sliding and not getattr(held, "record_past", False)
        filled = slice(max(buffers.length - held.sliding_window + 1, 0) if forgets else 0, buffers.length)
        yield held, k[None, :, filled], v[None, :, filled]


def read_cache(buffers: CacheBuffers, cache: Any, length: int) -> None:
    """Copy the tokens that `cache` holds into `buffers`: the last ones, where a window has moved on."""
    for held, k, v in _pairs(buffers, cache):
        tokens = slice(length - held.keys.shape[-2], length)
        k[:, tokens], v[:, tokens] = held.keys[0], held.values[0]
    buffers.length = length


def sync_cache_views(buffers: CacheBuffers, cache: Any) -> None:
    """Point transformers' cache at the filled part of the native buffers."""
    for index in range(len(cache.layers), buffers.depth):
        k, v = buffers.blocks[index][0]
        cache.update(k[None, :, :0], v[None, :, :0], index)
    for held, keys, values in _views(buffers, cache):
        if not held.is_initialized:
            held.lazy_initialization(keys, values)
        held.keys, held.values = keys, values
        if held.is_sliding:
            held.cumulative_length = buffers.length
