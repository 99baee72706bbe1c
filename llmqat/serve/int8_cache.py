"""The key-value cache that stores int8 codes, and how a model starts one.

The grid is that of `llmqat.nn.kv_cache.quantize_kv`: codes and scales dequantize to the bits that training saw.
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
    DummyLayer,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
)

from llmqat.compat.caches import cache_of, generate_cache_name, give_cache, max_length_of
from llmqat.errors import LlmqatError
from llmqat.kernels.activations import quantize_activation
from llmqat.nn.kv_cache import KVQuantizer
from llmqat.quant.affine import dequantize_activation


class Int8Layer(CacheLayerMixin):
    """Cache of one layer: int8 codes, and float32 scales ``(batch, heads, tokens, 1)``.

    Two ordinary cache layers of the same kind hold them; whatever is done to one is done to the other.
    """

    def __init__(self, empty: Any) -> None:
        self.codes, self.scales = deepcopy(empty), deepcopy(empty)
        super().__init__()
        self.is_sliding, self.is_croppable = empty.is_sliding, True

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
        """Tokens stored so far."""
        return int(self.codes.get_seq_length())

    def get_max_length(self) -> int:
        """Tokens it can hold; -1 for any number."""
        return int(max_length_of(self.codes))

    get_max_cache_shape = get_max_length  # its name up to transformers 5.23

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for `query_length` new tokens."""
        sizes: tuple[int, int] = self.codes.get_mask_sizes(query_length)
        return sizes

    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.codes.keys, self.codes.values, self.scales.keys, self.scales.values)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def _on_codes_and_scales(name: str) -> Any:
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
    setattr(Int8Layer, _name, _on_codes_and_scales(_name))


class Int8Cache(Cache):
    """A growing key-value cache of int8 codes, full or sliding as `config` says, layer by layer. Inference only.

    Attributes:
        stores_codes: marks a cache that quantizes what it stores.

    Raises:
        LlmqatError: for a layer that is neither.
    """

    stores_codes = True

    def __init__(self, config: Any) -> None:
        layers: list[Any] = []
        for index, layer in enumerate(DynamicCache(config=config).layers):
            if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer):
                raise LlmqatError(
                    f"layer {index} caches in a {type(layer).__name__}: --kv-bits 8 knows full and sliding attention "
                    "only; leave it out"
                )
            layers.append(layer if type(layer) is DummyLayer else Int8Layer(layer))  # of keys of another block
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
    wanted = module.config.get_text_config().use_cache if use_cache is None else use_cache  # type: ignore[operator,union-attr]
    if wanted and cache_of(kwargs) is None and not torch.is_grad_enabled() and _enabled(module):
        give_cache(type(module).forward, kwargs, Int8Cache(module.config))
    return args, kwargs


def serve_int8_kv(model: PreTrainedModel) -> None:
    """Let `model`, after `quantize_kv`, start `Int8Cache` in its forward and in `generate`.

    Raises:
        LlmqatError: see `Int8Cache`.
    """
    Int8Cache(model.config)
    model.base_model.register_forward_pre_hook(_start_cache, with_kwargs=True)
    model.generate = MethodType(_generate, model)  # type: ignore[method-assign,assignment]
