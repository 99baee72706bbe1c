"""Builds the native decoder of a model's blocks, again when a tensor that it borrows is no longer the model's."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.kernels.decoder import UNLIMITED, Block, NativeDecoder, Shape, split_rows
from llmqat.kernels.mixing import Mixing
from llmqat.kernels.packed import Packed, check_packed
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.borrowed import Borrowed
from llmqat.serve.covered import MAX_HEAD_DIM, unknown_tensors, why_model_not_covered
from llmqat.serve.families import ACTIVATIONS, FAMILIES, OPTIONAL_NORMS, QUERIES, SHARED, UNROTATED, Family
from llmqat.serve.parts import (
    activation_of,
    attention_of,
    find,
    first_attention,
    heads_of,
    keys_of,
    last_norm,
    linears_of,
    number_of,
    query_kind,
    rotary_kinds,
    rows_of,
    side_features,
    splits,
    window_of,
)


def why_not_covered(model: nn.Module, stack: Any) -> str:
    """Why the native decoder never computes the blocks of `model`; empty if it can."""
    why_not = why_model_not_covered(model, stack)
    if why_not or native.library() is None:
        return why_not or native.explain()
    return why_blocks_not_covered(stack)


def why_blocks_not_covered(stack: Any) -> str:
    """Why the native decoder does not compute these blocks as they are now; empty if it does."""
    config, family = stack.config, FAMILIES[stack.config.model_type]
    dtype, first = last_norm(stack).weight.dtype, first_attention(stack)
    if last_norm(stack).weight.device.type != "cpu" or dtype not in native.DTYPES:
        return f"the model is on {last_norm(stack).weight.device} in {dtype}"
    if first is None:
        return "no block has attention"
    linears = [linear for layer in stack.layers for linear in linears_of(layer, family).values()]
    # Static activations are quantized by the module, which the native decoder passes by.
    if not all(isinstance(linear, PackedLinear) and linear.input_scale is None for linear in linears):
        return "a layer of a block is not packed, or has static activations"
    probe = torch.empty(0, dtype=dtype)
    if not all(native.supports(probe, linear.weight_scale, linear.in_features) for linear in linears):
        return "the kernels know no groups of this size"
    unknown = next((name for layer in stack.layers for name in unknown_tensors(layer, family)), "")
    if unknown:
        return f"the native decoder does not know {unknown} of a block"
    attentions = (attention_of(layer, family) for layer in stack.layers)
    if any(attention is not None and attention.scaling != first.scaling for attention in attentions):
        return "layers scale the scores of their attention by different factors"
    parts = [pair for layer in stack.layers for pair in _parts(layer, family, config)]
    if not all(fits_shape(linear, sum(rows.values())) for linear, rows in parts) or not _norms_fit(stack, family):
        return "the shapes of a block are not those of the config"
    if not all(splits(linear, list(rows.values())) for linear, rows in parts):
        return "the zero points of a fused layer begin in the middle of a word"
    return ""


def fits_shape(linear: PackedLinear, out_features: int) -> bool:
    """Whether a packed layer is a valid one of `out_features` rows, stored without gaps as the library reads it."""
    try:
        check_packed(linear.packed)
    except LlmqatError:
        return False
    tensors = (part for part in linear.packed if isinstance(part, Tensor))
    return linear.packed.codes.shape[0] == out_features and all(tensor.is_contiguous() for tensor in tensors)


def _norms_fit(stack: Any, family: Family) -> bool:
    """Whether every norm has a weight for each feature that it scales, in the dtype of the last one."""
    last, shape = last_norm(stack).weight, _shape(stack)
    if last.shape != (stack.config.hidden_size,):
        return False
    for layer in stack.layers:
        heads, norms = heads_of(layer, stack.config), _norms(layer, family, last.dtype)
        if family.norms.keys() - norms.keys() - set(OPTIONAL_NORMS):
            return False
        for name, weight in norms.items():
            features = shape.norm_features(name, *heads)
            if weight.shape != (features,) or weight.dtype != last.dtype or not weight.is_contiguous():
                return False
    return True


def _norms(layer: Any, family: Family, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of the norms that a block has; ones where a norm of heads has none."""
    norms = {name: find(layer, path) for name, path in family.norms.items()}
    ones = torch.ones(getattr(attention_of(layer, family), "head_dim", 0), dtype=dtype)
    weights = {name: getattr(norm, "weight", ones) for name, norm in norms.items() if norm is not None}
    return {name: weight.detach() for name, weight in weights.items()}


def _parts(layer: Any, family: Family, config: Any) -> Iterator[tuple[PackedLinear, dict[str, int]]]:
    """The linear layers of a block, and how many rows each part of theirs has."""
    linears = linears_of(layer, family)
    return ((linears[path], rows) for path, rows in rows_of(layer, family, config).items())


def _block(layer: Any, stack: Any, tables: tuple[int, int], keys: int | None) -> Block:
    family = FAMILIES[stack.config.model_type]
    linears: dict[str, Packed] = {}
    for linear, rows in _parts(layer, family, stack.config):
        linears |= dict(zip(rows, split_rows(linear.packed, list(rows.values())), strict=True))
    return Block(
        linears,
        _norms(layer, family, last_norm(stack).weight.dtype),
        *heads_of(layer, stack.config),
        scale=find(layer, family.scale) if family.scale else None,
        window=window_of(layer, family) or UNLIMITED,
        rotary=tables[0],
        query_rotary=tables[1],
        keys_of=keys,
    )


@dataclass(frozen=True)
class Built:
    """A decoder, what it was built from, and why it cannot be used, if so."""

    borrowed: Borrowed
    decoder: NativeDecoder | None
    why_not: str


# Not an attribute of the model: a copy of it must get its own.
_built: WeakKeyDictionary[nn.Module, Built] = WeakKeyDictionary()


def decoder_of(stack: Any) -> NativeDecoder | str:
    """The native decoder of `stack`, built when it first runs and when a tensor was replaced; or why there is none.

    There is none while a block does not fit (a layer unpacked, moved or cast), or a hook listens inside one.
    """
    known = _built.get(stack)
    if known is None or not known.borrowed.is_unchanged():
        borrowed = Borrowed.of(stack)
        why_not = "hooks listen inside the blocks" if borrowed.listeners else why_blocks_not_covered(stack)
        known = _built[stack] = Built(borrowed, None if why_not else _build(stack), why_not)
    return known.why_not if known.decoder is None else known.decoder


def _shape(stack: Any) -> Shape:
    config, family, attention = stack.config, FAMILIES[stack.config.model_type], first_attention(stack)
    return Shape(
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        eps=getattr(config, family.eps),
        norm_offset=family.norm_offset,
        norm_rounds_once=family.norm_rounds_once,
        head_norm=family.head_norm,
        neighbours=family.neighbours,
        output_gate=family.output_gate,
        attention_scale=attention.scaling,
        softcap=number_of(config, family.attention_cap, 0.0),
        activation=ACTIVATIONS[activation_of(config, family)],
        side=side_features(config, family),
        embedding_scale=number_of(config, family.embedding_scale, 1.0),
        residual_scale=number_of(config, family.residual_scale, 1.0),
    )


def _build(stack: Any) -> NativeDecoder:
    family, shape, kinds = FAMILIES[stack.config.model_type], _shape(stack), rotary_kinds(stack)
    places = {kind: index for index, kind in enumerate(_table_kinds(stack))}
    tables = [(places[kind], places[query_kind(kind, family)]) for kind in kinds]
    each = zip(stack.layers, tables, keys_of(stack), strict=True)
    blocks = [_block(layer, stack, pair, keys) for layer, pair, keys in each]
    return NativeDecoder(blocks, last_norm(stack).weight.detach(), shape)


def rotary_tables(stack: Any, embeds: Tensor, position_ids: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Cosines and sines ``(m, dim)`` of these positions ``(1, m)``, for every kind of layer: see `rotary_kinds`."""
    return [_rotary_table(stack, embeds, position_ids, kind) for kind in _table_kinds(stack)]


def _table_kinds(stack: Any) -> list[str]:
    """The kinds of rotary tables of a stack, in the order in which blocks count them."""
    kinds, family = set(rotary_kinds(stack)), FAMILIES[stack.config.model_type]
    return sorted(kinds | {query_kind(kind, family) for kind in kinds})


def _rotary_table(stack: Any, embeds: Tensor, position_ids: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    if kind == UNROTATED:
        empty = embeds.new_empty(position_ids.shape[1], 0)
        return empty, empty
    if kind == QUERIES:
        cosine, sine = _rotary_table(stack, embeds, position_ids, SHARED)
        scale = FAMILIES[stack.config.model_type].query_scale
        assert scale is not None
        factor = scale(stack.config, position_ids[0, :, None]).to(embeds.dtype).float()
        return cosine * factor, sine * factor
    cosine, sine = stack.rotary_emb(embeds, position_ids, *([] if kind == SHARED else [kind]))
    return cosine[0], sine[0]


def rotary_fits(stack: Any, tables: list[tuple[Tensor, Tensor]], tokens: int) -> bool:
    """Whether the tables have a row for each token, and rotate pairs of features, no more than a head has, in a dtype
    that the library reads."""
    family, dtype = FAMILIES[stack.config.model_type], last_norm(stack).weight.dtype
    widths = dict.fromkeys(_table_kinds(stack), MAX_HEAD_DIM)
    for layer, kind in zip(stack.layers, rotary_kinds(stack), strict=True):
        _, head_dim = heads_of(layer, stack.config)
        for one in (kind, query_kind(kind, family)) if head_dim else ():
            widths[one] = min(widths[one], head_dim)
    return all(
        table.ndim == 2
        and table.shape[0] == tokens
        and table.shape[1] <= width
        and table.shape[1] % 2 == 0
        and table.dtype in (dtype, torch.float32)
        for pair, width in zip(tables, widths.values(), strict=True)
        for table in pair
    )


def mixing_of(stack: Any, cache: Any) -> Mixing | None:
    """The mixers of a stack that stand in the place of attention, as the library calls them; None where it has none.

    They keep their state in `cache`, if there is one.
    """
    name = FAMILIES[stack.config.model_type].mixer
    if not name:
        return None

    def mix(block: int, hidden: Tensor) -> Tensor:
        mixed: Tensor = getattr(stack.layers[block], name)(hidden[None], cache)
        return mixed[0]

    return Mixing(mix, stack.config.hidden_size, last_norm(stack).weight.dtype)
