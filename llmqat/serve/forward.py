"""Runs the blocks of packed Llama-like models in the native decoder, inside the ordinary transformers model.

`accelerate_forward` replaces the forward of the decoder stack. What it does not cover - batches, padding, gradients,
attention weights, caches of another kind - goes through the transformers code as before, on the same weights and the
same cache: its layers hold views of the buffers that the native code writes.
"""

from collections.abc import Iterator
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from llmqat.compat import cache_name, cache_of, output_with_cache, refuse_unknown_caches
from llmqat.kernels import native
from llmqat.kernels.decoder import UNLIMITED, Block, CacheBuffers, NativeDecoder, Shape, split_rows
from llmqat.nn.kv_cache import Int8Cache, Int8Layer, quantizes_kv
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.families import (
    ACTIVATIONS,
    FAMILIES,
    Family,
    cap_of,
    linears_of,
    rotary_kinds,
    rows_of,
    splits,
    window_of,
)

MAX_HEAD_DIM = 256


def accelerate_forward(model: PreTrainedModel) -> bool:
    """Let `model` run its blocks natively where it can; False, and nothing changed, where it never can."""
    stack = getattr(model, "model", None)
    if model.config.model_type not in FAMILIES or stack is None or not _covers(model, stack):
        return False
    stack.forward = MethodType(_forward, stack)
    return True


def _covers(model: PreTrainedModel, stack: Any) -> bool:
    config = model.config
    dtype = stack.norm.weight.dtype
    if native.library() is None or stack.norm.weight.device.type != "cpu" or dtype not in native.DTYPES:
        return False
    family, head_dim = FAMILIES[config.model_type], stack.layers[0].self_attn.head_dim
    linears = [linear for layer in stack.layers for linear in linears_of(layer, family)]
    # Static activations are quantized by the module, which the native decoder passes by.
    packed = all(isinstance(linear, PackedLinear) and linear.input_scale is None for linear in linears)
    probe = torch.empty(0, dtype=dtype)
    runs = packed and all(native.supports(probe, linear.weight_scale, linear.in_features) for linear in linears)
    rows = rows_of(family, config, head_dim) * len(stack.layers)
    apart = runs and all(splits(linear, parts) for linear, parts in zip(linears, rows, strict=True))
    causal = not getattr(config, "use_bidirectional_attention", None)
    return bool(apart and causal and getattr(config, family.activation) in ACTIVATIONS and head_dim <= MAX_HEAD_DIM)


def _block(layer: Any, family: Family, rows: list[list[int]], rotary: int) -> Block:
    whole = [linear.arguments() for linear in linears_of(layer, family)]
    linears = [part for layer, parts in zip(whole, rows, strict=True) for part in split_rows(layer, parts)]
    norms = {name: layer.get_submodule(path).weight for name, path in family.norms.items()}
    return Block(linears, norms, window_of(layer, family) or UNLIMITED, rotary)


def _pointers(stack: Any) -> tuple[int, ...]:
    """What the decoder borrows; it is built again when one of them has moved."""
    linears = linears_of(stack.layers[-1], FAMILIES[stack.config.model_type])
    return stack.norm.weight.data_ptr(), *(linear.weight_packed.data_ptr() for linear in linears)


def _holds(buffers: CacheBuffers, cache: Any, length: int) -> bool:
    """Whether the views that we gave to `cache` are still what it holds."""
    if buffers.length != length or len(cache.layers) != len(buffers.blocks):
        return False
    return all(
        held.keys.data_ptr() == keys.data_ptr() and held.values.data_ptr() == values.data_ptr()
        for held, keys, values in _views(buffers, cache)
    )


def _pairs(buffers: CacheBuffers, cache: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Cache layers of transformers, and the buffers for their keys and values."""
    for layer, block in zip(cache.layers, buffers.blocks, strict=True):
        halves = (layer.codes, layer.scales) if isinstance(layer, Int8Layer) else (layer,)
        for held, (k, v) in zip(halves, block, strict=True):
            yield held, k, v


def _views(buffers: CacheBuffers, cache: Any) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Cache layers, and the keys and values ``(1, kv_heads, tokens, width)`` that each holds of what is filled:
    the last ones in a window, all in others, and in one that records the past."""
    for held, k, v in _pairs(buffers, cache):
        forgets = held.is_sliding and not held.record_past
        filled = slice(max(buffers.length - held.sliding_window + 1, 0) if forgets else 0, buffers.length)
        yield held, k[None, :, filled], v[None, :, filled]


def _read(buffers: CacheBuffers, cache: Any, length: int) -> None:
    """Copy the tokens that `cache` holds: the last ones, where a window has moved on."""
    for held, k, v in _pairs(buffers, cache):
        tokens = slice(length - held.keys.shape[-2], length)
        k[:, tokens], v[:, tokens] = held.keys[0], held.values[0]
    buffers.length = length


def reserve(buffers: CacheBuffers, decoder: NativeDecoder, tokens: int) -> None:
    """Have room for `tokens` tokens of `decoder`."""
    buffers.grow(decoder.blocks, decoder.shape.kv_heads, decoder.shape.head_dim, decoder.dtype, tokens)


def show(buffers: CacheBuffers, cache: Any) -> None:
    """Give `cache` views of what is filled."""
    for index in range(len(cache.layers), len(buffers.blocks)):
        k, v = buffers.blocks[index][0]
        cache.update(k[None, :, :0], v[None, :, :0], index)
    for held, keys, values in _views(buffers, cache):
        if not held.is_initialized:
            held.lazy_initialization(keys, values)
        held.keys, held.values = keys, values
        if held.is_sliding:
            held.cumulative_length = buffers.length


# Decoders and the pointers that they borrow. Not an attribute of the model: a copy of it must get its own.
_decoders: WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], NativeDecoder]] = WeakKeyDictionary()


def decoder_of(stack: Any) -> NativeDecoder:
    """The native decoder of `stack`, built when it first runs and again when tensors have been replaced."""
    borrowed = _pointers(stack)
    known = _decoders.get(stack)
    if known is not None and known[0] == borrowed:
        return known[1]
    decoder = _build(stack, stack.config, FAMILIES[stack.config.model_type])
    _decoders[stack] = borrowed, decoder
    return decoder


def _build(stack: Any, config: Any, family: Family) -> NativeDecoder:
    attention = stack.layers[0].self_attn
    shape = Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=attention.head_dim,
        intermediate=config.intermediate_size,
        eps=config.rms_norm_eps,
        norm_offset=family.norm_offset,
        attention_scale=attention.scaling,
        softcap=cap_of(config, family.attention_cap),
        activation=ACTIVATIONS[getattr(config, family.activation)],
    )
    rows, kinds = rows_of(family, config, attention.head_dim), rotary_kinds(config, family)
    types = config.layer_types if family.rotary_by_layer_type else [None] * len(stack.layers)
    rotary = [kinds.index(kind) for kind in types]
    blocks = [_block(layer, family, rows, table) for layer, table in zip(stack.layers, rotary, strict=True)]
    return NativeDecoder(blocks, stack.norm.weight, shape)


def rotary_tables(stack: Any, embeds: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines ``(m, dim)`` of these positions ``(1, m)``, for every kind of layer."""
    kinds = rotary_kinds(stack.config, FAMILIES[stack.config.model_type])
    tables = [stack.rotary_emb(embeds, position_ids, *([] if kind is None else [kind])) for kind in kinds]
    return [(cosine[0], sine[0]) for cosine, sine in tables]


def _stores_int8(stack: Any, cache: Any) -> bool:
    return quantizes_kv(stack.layers[-1].self_attn) if cache is None else isinstance(cache, Int8Cache)


def _run(stack: Any, embeds: Tensor, position_ids: Tensor, cache: Any, past: int) -> Tensor:
    """Hidden states ``(1, m, hidden)`` after the last norm; `cache` then holds the new tokens too."""
    decoder = decoder_of(stack)
    tokens = embeds.shape[1]
    buffers = getattr(cache, "llmqat_buffers", None) or CacheBuffers(_stores_int8(stack, cache))
    ours = cache is None or _holds(buffers, cache, past)
    reserve(buffers, decoder, past + tokens)
    if cache is not None and not ours and past:
        _read(buffers, cache, past)
    hidden = decoder(embeds[0], buffers, past, rotary_tables(stack, embeds, position_ids))
    if cache is not None:
        buffers.length = past + tokens
        show(buffers, cache)
        cache.llmqat_buffers = buffers
    return hidden[None]


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
    cache = cache_of({"cache": cache, "past_key_values": past_key_values})
    refuse_unknown_caches(kwargs)
    if not takes(self, input_ids, attention_mask, cache, inputs_embeds, kwargs):
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
    embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    use_cache = self.config.use_cache if use_cache is None else use_cache
    if use_cache and cache is None:
        cache = (Int8Cache if _stores_int8(self, None) else DynamicCache)(config=self.config)
    past = cache.get_seq_length() if cache is not None else 0
    if position_ids is None:
        position_ids = torch.arange(past, past + embeds.shape[1])[None]
    return output_with_cache(_run(self, embeds, position_ids, cache, past), cache)


def takes(
    stack: Any, input_ids: Tensor | None, mask: Tensor | None, cache: Any, embeds: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """One sequence without padding, no gradients, and nothing asked for but the hidden states."""
    given, dtype = input_ids if embeds is None else embeds, stack.norm.weight.dtype
    if dtype not in native.DTYPES or not isinstance(stack.layers[-1].mlp.down_proj, PackedLinear):
        return False  # cast, or unpacked, since
    if embeds is not None and embeds.dtype != dtype:
        return False
    if given is None or given.shape[0] != 1 or given.shape[1] == 0 or given.device.type != "cpu":
        return False
    if stack.training or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    if any(kwargs.get(name) for name in ("output_attentions", "output_hidden_states", "return_legacy_cache")):
        return False
    if kwargs.get("return_dict") is False or not _fits(stack, cache):
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.ndim == 2 and bool(mask.all()))


def _fits(stack: Any, cache: Any) -> bool:
    """Whether the native decoder stores what `cache` would: floats, or int8 codes; not quantized floats."""
    if cache is None or type(cache) is Int8Cache:
        return True
    return type(cache) is DynamicCache and not quantizes_kv(stack.layers[-1].self_attn)
