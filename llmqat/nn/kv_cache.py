"""The key-value cache in int8: one scale per token and head, in training and in inference.

Keys and values are quantized as they are stored: keys after the rotary embedding, both before they are repeated for
grouped queries. `quantize_kv` puts the grid into every attention layer, where training runs through it (gradients pass
straight through) whatever cache is in use, or none. A cache that stores the codes themselves (`Int8Cache` of
llmqat/serve) gives back the same bits, because both call `quantize_activation` on the same tensors.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.compat.caches import cache_name, cache_of, give_cache
from llmqat.errors import LlmqatError
from llmqat.kernels.activations import fake_quant_activation

KV_BITS = (8,)


class KVQuantizer(nn.Module):
    """Marks an attention layer whose keys and values are on the grid. `enabled` False leaves them float."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits, self.enabled = bits, True

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"bits={self.bits}"


class QuantizingCache:
    """Stands in the place of a cache: quantizes what an attention layer stores, then stores it in the cache, if any."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Quantize and store keys and values ``(batch, heads, tokens, head_dim)``; returns all that are stored."""
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
    if quantizer.enabled and not getattr(cache, "stores_codes", False):
        give_cache(type(module).forward, kwargs, QuantizingCache(cache))
    return args, kwargs


def check_kv_bits(bits: int) -> None:
    """Refuse widths of keys and values that there is no grid for.

    Raises:
        LlmqatError: if `bits` is not 8.
    """
    if bits not in KV_BITS:
        raise LlmqatError(f"kv_bits must be 8, or left out for a float cache; got {bits}")


def quantize_kv(model: PreTrainedModel, bits: int) -> None:
    """Put keys and values of every attention layer of `model` on an int8 grid, in place.

    Raises:
        LlmqatError: if `bits` is not 8, or the model has no attention layer that takes a cache.
    """
    check_kv_bits(bits)
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


def is_kv_hook(hook: Any) -> bool:
    """Whether a forward pre-hook is that of `quantize_kv`."""
    return hook is _quantize_stored


def kv_bits_of(model: nn.Module) -> int | None:
    """The width to which `quantize_kv` quantized the cache of `model`; None for a float one."""
    return next((module.bits for module in model.modules() if isinstance(module, KVQuantizer)), None)
