"""The parts of a model's blocks, found by the row of its family."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmqat.kernels.decoder import ATTENTION, OPTIONAL
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.families import FAMILIES, QUERIES, SHARED, UNROTATED, Family


def number_of(config: Any, name: str, otherwise: float) -> float:
    """A number of the config; `otherwise` where the family has no name for it, or the config no value."""
    value = getattr(config, name) if name else None
    return otherwise if value is None else float(value)


def activation_of(config: Any, family: Family) -> str:
    """The activation of the gate, as configs name it."""
    return getattr(config, family.activation) if family.activation else "silu"


def last_norm(stack: Any) -> Any:
    """The norm of a decoder stack behind its blocks."""
    return getattr(stack, FAMILIES[stack.config.model_type].last_norm)


def rotary_kinds(stack: Any) -> list[str]:
    """Which rotary tables each layer of a decoder stack uses: those of its type, or shared ones, or empty ones."""
    family, layers = FAMILIES[stack.config.model_type], stack.layers
    kinds = stack.config.layer_types if family.rotary_by_layer_type else [SHARED] * len(layers)
    pairs = zip((attention_of(layer, family) for layer in layers), kinds, strict=True)
    return [kind if attention is None or family.rotates(attention) else UNROTATED for attention, kind in pairs]


def query_kind(kind: str, family: Family) -> str:
    """Which rotary tables the queries of a layer use whose keys use these."""
    return QUERIES if family.query_scale is not None else kind


def find(layer: Any, path: str) -> Any:
    """The module or tensor at a path in a block; None if there is none."""
    for name in path.split("."):
        layer = getattr(layer, name, None)
    return layer


def attention_of(layer: Any, family: Family) -> Any:
    """The attention of a block; None where the mixer of its family stands in its place."""
    return None if family.mixer and hasattr(layer, family.mixer) else layer.self_attn


def first_attention(stack: Any) -> Any:
    """The attention of the first block that has one; None if none has."""
    family = FAMILIES[stack.config.model_type]
    found = (attention_of(layer, family) for layer in stack.layers)
    return next((attention for attention in found if attention is not None), None)


def linears_of(layer: Any, family: Family) -> dict[str, Any]:
    """The linear layers of a block by their path, without those that it may lack and does."""
    found = {path: find(layer, path) for path in family.linears}
    lacks = OPTIONAL if attention_of(layer, family) is not None else OPTIONAL.union(ATTENTION)
    optional = {path for path, parts in family.linears.items() if lacks.issuperset(parts)}
    return {path: linear for path, linear in found.items() if linear is not None or path not in optional}


def window_of(layer: Any, family: Family) -> int | None:
    """How many tokens a query of this block sees, itself included; None for all."""
    attention = attention_of(layer, family)
    return None if attention is None else family.window(attention)


def heads_of(layer: Any, config: Any) -> tuple[int, int]:
    """How many heads the keys and values of a block have, and how many features a head; none without attention."""
    attention = attention_of(layer, FAMILIES[config.model_type])
    if attention is None:
        return 0, 0
    return config.num_attention_heads // attention.num_key_value_groups, attention.head_dim


def side_features(config: Any, family: Family) -> int:
    """How many features the side input of a block has; 0 where there is none."""
    return int(getattr(config, family.side_size) or 0) if family.side_size else 0


def side_inputs(stack: Any, ids: Tensor | None, embeds: Tensor, given: Tensor | None = None) -> Tensor | None:
    """Side inputs ``(m, blocks, features)`` of ids ``(1, m)`` or their embeddings, of which `given` holds the part that
    the tokens alone decide, if it is known; None where there are none."""
    if not side_features(stack.config, FAMILIES[stack.config.model_type]):
        return None
    given = stack.get_per_layer_inputs(ids, embeds) if given is None else given
    side: Tensor = stack.project_per_layer_inputs(embeds, given)
    return side[0]


def keys_of(stack: Any) -> list[int | None]:
    """For each block, the number of the one whose keys and values it reads; None for its own."""
    family, numbers = FAMILIES[stack.config.model_type], []
    last: dict[str, int | None] = {}
    kinds = getattr(stack.config, "layer_types", None) or [SHARED] * len(stack.layers)
    for index, (layer, kind) in enumerate(zip(stack.layers, kinds, strict=True)):
        attention = attention_of(layer, family)
        if attention is not None and family.shares(attention):
            numbers.append(last[kind])
        else:
            numbers.append(None)
            last[kind] = index
    return numbers


def rows_of(layer: Any, family: Family, config: Any) -> dict[str, dict[str, int]]:
    """For each linear layer of a block, by its path, how many rows its parts have."""
    (kv_heads, head_dim), linears = heads_of(layer, config), linears_of(layer, family)
    intermediate = next(linears[path].in_features for path, parts in family.linears.items() if "down" in parts)
    heads = {"q": config.num_attention_heads, "k": kv_heads, "v": kv_heads}
    sizes = {part: count * head_dim for part, count in heads.items()}
    sizes["q"] *= 2 if family.output_gate else 1
    sizes |= {"gate": intermediate, "up": intermediate, "side_gate": side_features(config, family)}
    return {path: {part: sizes.get(part, config.hidden_size) for part in family.linears[path]} for path in linears}


def splits(linear: PackedLinear, rows: Sequence[int]) -> bool:
    """Whether these rows of a packed layer begin at whole words of its zero points, which are packed along them."""
    starts = [sum(rows[:part]) for part in range(len(rows))]
    return linear.weight_zero_point is None or all(start * linear.scheme.bits % 32 == 0 for start in starts)
