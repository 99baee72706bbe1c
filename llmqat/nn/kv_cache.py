"""The key-value cache in int8: one scale per token and head, in training and in inference.

Keys and values are quantized as they are stored: keys after the rotary embedding, both before they are repeated for
grouped queries. `quantize_kv` puts the grid into every attention layer, where training runs through it (gradients pass
straight through) whatever cache is in use, or none. `Int8Cache` stores the codes themselves; what it gives back has the
same bits, because both call `quantize_activation` on the same tensors.
"""

from copy import deepcopy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from llmqat.compat import CACHE_NAMES, cache_name, cache_of, generate_cache_name
from llmqat.errors import LlmqatError
from llmqat.quant.affine import dequantize_activation, quantize_activation
from llmqat.quant.fake_quant import fake_quant_activation

KV_BITS = (8,)


class KVQuantizer(nn.Module):
    """Marks an attention layer whose keys and values are on the grid. `enabled` False leaves them float."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.enabled = bits, True

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"bits={self.bits}"


class _Through:
    """In the place of a cache: quantizes what an attention layer stores, then stores it in the cache, if any."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``(batch, heads, tokens, head_dim)``; with a cache, also those of earlier tokens."""
        keys, values = fake_quant_activation(keys), fake_quant_activation(values)
        if self.cache is None:
            return keys, values
        stored: tuple[Tensor, Tensor] = self.cache.update(keys, values, *args, **kwargs)
        return stored

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


def _quantize_stored(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of an attention layer."""
    quantizer, cache = module.kv_quantizer, cache_of(kwargs)
    assert isinstance(quantizer, KVQuantizer)
    if quantizer.enabled and not isinstance(cache, Int8Cache):
        _give_cache(module, kwargs, _Through(cache))
    return args, kwargs


def _give_cache(module: nn.Module, kwargs: dict[str, Any], cache: Any) -> None:
    """Let the arguments of a call of `module` hold `cache`, under the one name that its forward knows."""
    for name in CACHE_NAMES:
        kwargs.pop(name, None)
    kwargs[str(cache_name(type(module).forward))] = cache


def quantize_kv(model: PreTrainedModel, bits: int) -> None:
    """Put keys and values of every attention layer of `model` on an int8 grid, in place.

    Raises:
        LlmqatError: if `bits` is not 8, or the model has no attention layer that takes a cache.
    """
    if bits not in KV_BITS:
        raise LlmqatError(f"kv_bits must be 8, or left out for a float cache; got {bits}")
    layers = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("Attention") and cache_name(type(module).forward)
    ]
    if not layers:
        raise LlmqatError(f"kv_bits is {bits}, but {type(model).__name__} has no attention with a cache; leave it out")
    for layer in layers:
        layer.kv_quantizer = KVQuantizer(bits)
        layer.register_forward_pre_hook(_quantize_stored, with_kwargs=True)


def quantizes_kv(attention: nn.Module) -> bool:
    """Whether keys and values of this attention layer are put on the grid, now."""
    quantizer = getattr(attention, "kv_quantizer", None)
    return isinstance(quantizer, KVQuantizer) and quantizer.enabled


def kv_bits_of(model: nn.Module) -> int | None:
    """The width to which `quantize_kv` quantized the cache of `model`; None for a float one."""
    return next((module.bits for module in model.modules() if isinstance(module, KVQuantizer)), None)


class Int8Layer(CacheLayerMixin):
    """Cache of one layer: int8 codes, and float32 scales ``(batch, heads, tokens, 1)``.

    Two ordinary cache layers of the same kind hold them; whatever is done to one is done to the other.
    """

    def __init__(self, empty: Any) -> None:
        self.codes, self.scales = deepcopy(empty), deepcopy(empty)
        super().__init__()
        self.is_sliding, self.is_croppable = empty.is_sliding, empty.is_croppable

    @property
    def is_initialized(self) -> bool:
        """Whether it holds anything."""
        return bool(self.codes.is_initialized)

    @is_initialized.setter
    def is_initialized(self, value: bool) -> None:
        self.codes.is_initialized = self.scales.is_initialized = value

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do before the first codes."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store keys and values of new tokens; give back those of all, dequantized to the dtype of the new."""
        (k, ks), (v, vs) = quantize_activation(key_states), quantize_activation(value_states)
        k, v = self.codes.update(k, v)
        ks, vs = self.scales.update(ks, vs)
        return dequantize_activation(k, ks, key_states.dtype), dequantize_activation(v, vs, value_states.dtype)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return int(self.codes.get_seq_length())

    def get_max_length(self) -> int:
        """Tokens it can hold; -1 for any number."""
        return int(self.codes.get_max_length())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for so many new tokens."""
        sizes: tuple[int, int] = self.codes.get_mask_sizes(query_length)
        return sizes

    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.codes.keys, self.codes.values, self.scales.keys, self.scales.values)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _both(name: str) -> Any:
    def method(self: Int8Layer, *args: Any) -> None:
        for layer in (self.codes, self.scales):
            getattr(layer, name)(*args)

    method.__doc__ = f"`{name}` on codes and scales."
    return method


for _name in (
    "offload",
    "prefetch",
    "reset",
    "reorder_cache",
    "crop",
    "batch_repeat_interleave",
    "batch_select_indices",
    "activate_past_recording",
):
    setattr(Int8Layer, _name, _both(_name))


class Int8Cache(Cache):
    """A growing key-value cache of int8 codes, full or sliding as `config` says, layer by layer. Inference only.

    Raises:
        LlmqatError: for a layer that is neither.
    """

    def __init__(self, config: Any) -> None:
        layers: list[Any] = []
        for index, layer in enumerate(DynamicCache(config=config).layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
                raise LlmqatError(
                    f"layer {index} caches in a {type(layer).__name__}: --kv-bits 8 knows full and sliding attention "
                    "only; leave it out"
                )
            layers.append(Int8Layer(layer))
        super().__init__(layers=layers)

    def nbytes(self) -> int:
        """Bytes held by all layers."""
        return sum(layer.nbytes() for layer in self.layers if isinstance(layer, Int8Layer))


def _enabled(model: nn.Module) -> bool:
    return any(module.enabled for module in model.modules() if isinstance(module, KVQuantizer))


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """`generate` on an `Int8Cache`, unless the caller chose another cache, or none."""
    config = kwargs.get("generation_config") or self.generation_config
    chosen = kwargs.get("cache_implementation") or config.cache_implementation or cache_of(kwargs)
    if chosen is None and kwargs.get("use_cache", config.use_cache) is not False and _enabled(self):
        kwargs[generate_cache_name()] = Int8Cache(self.config)
    return type(self).generate(self, *args, **kwargs)  # type: ignore[attr-defined]


def _start_cache(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Forward pre-hook of the model below the head: where it would start a cache of its own, give it an `Int8Cache`."""
    use_cache = kwargs.get("use_cache")
    wanted = module.config.use_cache if use_cache is None else use_cache  # type: ignore[union-attr]
    if wanted and cache_of(kwargs) is None and not torch.is_grad_enabled() and _enabled(module):
        _give_cache(module, kwargs, Int8Cache(module.config))
    return args, kwargs


def serve_int8_kv(model: PreTrainedModel) -> None:
    """Let `model`, after `quantize_kv`, start `Int8Cache` in its forward and in `generate`.

    Raises:
        LlmqatError: see `Int8Cache`.
    """
    Int8Cache(model.config)
    model.base_model.register_forward_pre_hook(_start_cache, with_kwargs=True)
    model.generate = MethodType(_generate, model)  # type: ignore[method-assign,assignment]
