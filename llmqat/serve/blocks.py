"""Builds the native decoder of a model's blocks, again when a tensor that it borrows is no longer the model's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmqat.kernels import native
from llmqat.kernels.decoder import UNLIMITED, Block, NativeDecoder, Shape, split_rows
from llmqat.nn.kv_cache import listens_for_kv
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.packing import packed_width
from llmqat.serve.families import (
    ACTIVATIONS,
    FAMILIES,
    HEAD_NORMS,
    Family,
    cap_of,
    linears_of,
    rotary_kinds,
    rows_of,
    splits,
    window_of,
)

MAX_HEAD_DIM = 256


def why_not_covered(model: nn.Module, stack: Any) -> str:
    """Why the native decoder never computes the blocks of `model`; empty if it can."""
    config: Any = model.config
    if config.model_type not in FAMILIES or not hasattr(stack, "layers"):
        return f"the family {config.model_type} has no native blocks"
    if native.library() is None:
        return native.explain()
    return why_blocks_not_covered(stack)


def why_blocks_not_covered(stack: Any) -> str:
    """Why the native decoder does not compute these blocks as they are now; empty if it does."""
    config, family = stack.config, FAMILIES[stack.config.model_type]
    dtype, head_dim = stack.norm.weight.dtype, stack.layers[0].self_attn.head_dim
    if stack.norm.weight.device.type != "cpu" or dtype not in native.DTYPES:
        return f"the model is on {stack.norm.weight.device} in {dtype}"
    linears = [linear for layer in stack.layers for linear in linears_of(layer, family)]
    # Static activations are quantized by the module, which the native decoder passes by.
    if not all(isinstance(linear, PackedLinear) and linear.input_scale is None for linear in linears):
        return "a layer of a block is not packed, or has static activations"
    probe = torch.empty(0, dtype=dtype)
    if not all(native.supports(probe, linear.weight_scale, linear.in_features) for linear in linears):
        return "the kernels know no groups of this size"
    rows = rows_of(family, config, head_dim)
    parts = [pair for layer in stack.layers for pair in _parts(layer, family, rows)]
    if not all(fits_shape(linear, sum(counts)) for counts, linear in parts) or not _norms_fit(stack, family):
        return "the shapes of a block are not those of the config"
    if not all(splits(linear, counts) for counts, linear in parts):
        return "the zero points of a fused layer begin in the middle of a word"
    if getattr(config, "use_bidirectional_attention", None):
        return "attention looks both ways"
    if getattr(config, family.activation) not in ACTIVATIONS:
        return f"the kernels do not compute the activation {getattr(config, family.activation)}"
    return "" if head_dim <= MAX_HEAD_DIM else f"heads of {head_dim} features exceed the {MAX_HEAD_DIM} of the kernels"


def fits_shape(linear: PackedLinear, out_features: int) -> bool:
    """Whether the tensors of a packed layer have the sizes that the library reads, with `out_features` rows."""
    bits, packed, scale, zero_point = linear.scheme.bits, *linear.packed[:3]
    groups = scale.shape[1]
    return (
        packed.shape == (out_features, packed_width(linear.in_features, bits))
        and packed.dtype == torch.int32
        and scale.shape == (out_features, groups)
        and linear.in_features % groups == 0
        and (zero_point is None or zero_point.shape == (packed_width(out_features, bits), groups))
        and (linear.bias is None or linear.bias.shape == (out_features,))
        and all(tensor.is_contiguous() for tensor in (packed, scale, zero_point, linear.bias) if tensor is not None)
    )


def _norms_fit(stack: Any, family: Family) -> bool:
    """Whether every norm has a weight for each feature that it scales, in the dtype of the last one."""
    last, head_dim = stack.norm.weight, stack.layers[0].self_attn.head_dim
    if last.shape != (stack.config.hidden_size,):
        return False
    for layer in stack.layers:
        for name, path in family.norms.items():
            weight = layer.get_submodule(path).weight
            features = head_dim if name in HEAD_NORMS else last.shape[0]
            if weight.shape != (features,) or weight.dtype != last.dtype or not weight.is_contiguous():
                return False
    return True


def _parts(layer: Any, family: Family, rows: list[list[int]]) -> Iterator[tuple[list[int], PackedLinear]]:
    return zip(rows, linears_of(layer, family), strict=True)


def _block(layer: Any, family: Family, rows: list[list[int]], rotary: int) -> Block:
    linears = [part for parts, linear in _parts(layer, family, rows) for part in split_rows(linear.packed, parts)]
    norms = {name: layer.get_submodule(path).weight.detach() for name, path in family.norms.items()}
    return Block(linears, norms, window_of(layer, family) or UNLIMITED, rotary)


@dataclass(frozen=True)
class Built:
    """A decoder, what it was built from, and why it cannot be used, if so."""

    borrowed: tuple[Any, ...]
    decoder: NativeDecoder | None
    why_not: str


# Not an attribute of the model: a copy of it must get its own.
_built: WeakKeyDictionary[nn.Module, Built] = WeakKeyDictionary()


def _borrowed(stack: Any) -> tuple[Any, ...]:
    """Where every tensor of the blocks and the last norm lies, with dtype and shape, and how layers are quantized."""
    found: list[Any] = [_place(stack.norm.weight)]
    for module in stack.layers.modules():
        found += [_place(tensor) for tensor in (*module._parameters.values(), *module._buffers.values())]
        if isinstance(module, PackedLinear):
            found.append(module.scheme.act_bits)
        if any(map(_listens, (*module._forward_hooks.values(), *module._forward_pre_hooks.values()))):
            found.append("hooked")
    return tuple(found)


def _listens(hook: Any) -> bool:
    """Whether a hook may see or change what a block computes: ours is known, and those of transformers wait for flags
    that `forward` leaves to transformers."""
    return not listens_for_kv(hook) and getattr(hook, "__module__", "") != "transformers.utils.output_capturing"


def _place(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.device.type)


def decoder_of(stack: Any) -> NativeDecoder | str:
    """The native decoder of `stack`, built when it first runs and when a tensor was replaced; or why there is none.

    It is gone for as long as a block does not fit (a layer unpacked, moved or cast), or somebody listens inside one.
    """
    borrowed = _borrowed(stack)
    known = _built.get(stack)
    if known is None or known.borrowed != borrowed:
        why_not = "hooks listen inside the blocks" if "hooked" in borrowed else why_blocks_not_covered(stack)
        known = _built[stack] = Built(borrowed, None if why_not else _build(stack), why_not)
    return known.why_not if known.decoder is None else known.decoder


def _build(stack: Any) -> NativeDecoder:
    config, family, attention = stack.config, FAMILIES[stack.config.model_type], stack.layers[0].self_attn
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
    return NativeDecoder(blocks, stack.norm.weight.detach(), shape)


def rotary_tables(stack: Any, embeds: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines ``(m, dim)`` of these positions ``(1, m)``, for every kind of layer."""
    kinds = rotary_kinds(stack.config, FAMILIES[stack.config.model_type])
    tables = [stack.rotary_emb(embeds, position_ids, *([] if kind is None else [kind])) for kind in kinds]
    return [(cosine[0], sine[0]) for cosine, sine in tables]


def rotary_fits(stack: Any, tables: list[tuple[Tensor, Tensor]], tokens: int) -> bool:
    """Whether the tables have a row for each token, and turn pairs of features of a head, no more than it has."""
    head_dim, dtype = stack.layers[0].self_attn.head_dim, stack.norm.weight.dtype
    return all(
        table.ndim == 2
        and table.shape[0] == tokens
        and table.shape[1] <= head_dim
        and table.shape[1] % 2 == 0
        and table.dtype == dtype
        for pair in tables
        for table in pair
    )
