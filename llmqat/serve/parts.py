"""The parts of a model's blocks, found by the row of its family."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from llmqat.kernels.decoder import OPTIONAL
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.families import FAMILIES, QUERIES, SHARED, UNROTATED, Family


def number_of(config: Any, name: str, otherwise: float) -> float:
    """A number of the config; `otherwise` where the family has no name for it, or the config no value."""
    value = getattr(config, name) if name else None
    return otherwise if value is None else float(value)


def rotary_kinds(stack: Any) -> list[str]:
    """Which rotary tables each layer of a decoder stack uses: those of its type, or shared ones, or empty ones."""
    family, layers = FAMILIES[stack.config.model_type], stack.layers
    kinds = stack.config.layer_types if family.rotary_by_layer_type else [SHARED] * len(layers)
    pairs = zip(layers, kinds, strict=True)
    return [kind if family.rotates(layer.self_attn) else UNROTATED for layer, kind in pairs]


def query_kind(kind: str, family: Family) -> str:
    """Which rotary tables the queries of a layer use whose keys use these."""
    return QUERIES if family.query_scale is not None else kind


def find(layer: Any, path: str) -> Any:
    """The module or tensor at a path in a block; None if there is none."""
    for name in path.split("."):
        layer = getattr(layer, name, None)
    return layer


def linears_of(layer: Any, family: Family) -> dict[str, Any]:
    """The linear layers of a block by their path, without those that it may lack and does."""
    found = {path: find(layer, path) for path in family.linears}
    optional = {path for path, parts in family.linears.items() if OPTIONAL.issuperset(parts)}
    return {path: linear for path, linear in found.items() if linear is not None or path not in optional}


def window_of(layer: Any, family: Family) -> int | None:
    """How many tokens a query of this block sees, itself included; None for all."""
    return family.window(layer.self_attn)


def heads_of(layer: Any, config: Any) -> tuple[int, int]:
    """How many heads the keys and values of a block have, and how many features a head."""
    return config.num_attention_heads // layer.self_attn.num_key_value_groups, layer.self_attn.head_dim


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
        if family.shares(layer.self_attn):
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
    sizes |= {"gate": intermediate, "up": intermediate, "side_gate": side_features(config, family)}
    return {path: {part: sizes.get(part, config.hidden_size) for part in family.linears[path]} for path in linears}


def splits(linear: PackedLinear, rows: Sequence[int]) -> bool:
    """Whether these rows of a packed layer begin at whole words of its zero points, which are packed along them."""
    starts = [sum(rows[:part]) for part in range(len(rows))]
    return linear.weight_zero_point is None or all(start * linear.scheme.bits % 32 == 0 for start in starts)
