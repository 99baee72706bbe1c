"""Everything that the native decoder knows about model families, as data. A family whose block it computes is a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels.decoder import OF_ALL_HEADS, OF_HEAD, OF_ROTATED_HEAD
from llmqat.nn.packed_linear import PackedLinear

# Path of a layer in a block -> what its rows are, in order (csrc/core/decoder.h).
SEPARATE = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_proj": ("gate",),
    "mlp.up_proj": ("up",),
    "mlp.down_proj": ("down",),
}
FUSED = {
    "self_attn.qkv_proj": ("q", "k", "v"),
    "self_attn.o_proj": ("o",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}
FUSED_GATE = {
    "self_attn.q_proj": ("q",),
    "self_attn.k_proj": ("k",),
    "self_attn.v_proj": ("v",),
    "self_attn.o_proj": ("o",),
    "mlp.gate_up_proj": ("gate", "up"),
    "mlp.down_proj": ("down",),
}
NORMS = {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
NORMS_OF_OUTPUTS = {"attended_norm": "post_attention_layernorm", "mlp_out_norm": "post_feedforward_layernorm"}
HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
SANDWICH_NORMS = {
    "input_norm": "input_layernorm",
    "attended_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
}
# Activation of the gate, as configs name it -> `Activation` of csrc/core/steps.h.
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
# Rotary tables that all layers share, those of queries that are scaled by position, and the empty ones of layers that
# turn nothing.
SHARED, QUERIES, UNROTATED = "shared", "queries", "unrotated"


def sees_all(_: Any) -> int | None:
    """Window of attention modules without one."""
    return None


def rotates_always(_: Any) -> bool:
    """Rotation of families that rotate queries and keys in every layer."""
    return True


def _exaone4_window(attention: Any) -> int | None:
    return attention.sliding_window if attention.is_sliding else None


def _exaone4_rotates(attention: Any) -> bool:
    return attention.sliding_window is None or attention.is_sliding


def llama4_scale(config: Any, positions: Tensor) -> Tensor:
    """Factors of the queries at these positions, for attention over long texts (Llama 4, Ministral 3)."""
    rope = config.rope_parameters
    steps = torch.floor(positions / rope["original_max_position_embeddings"])
    return 1 + rope["llama_4_scaling_beta"] * torch.log(1 + steps)


@dataclass(frozen=True)
class Family:
    """One model family: q k v, rotary embedding, causal attention, o; gated MLP; and norms wherever there are some.

    Attributes:
        linears: path of a layer in a block -> what its rows are.
        norms: norm of csrc/core/decoder.h -> its path in a block.
        norm_offset: 1 where a norm multiplies by 1 + weight.
        norm_rounds_once: whether norms round only their product with the weight.
        head_norm: which norms those of q and k are (csrc/core/steps.h).
        neighbours: whether the rotary embedding turns pairs of neighbours; else a feature of each half.
        window: from an attention module to how many tokens a query sees, itself included; None for all.
        rotates: from an attention module to whether it rotates queries and keys.
        query_scale: from the config and positions to factors of the queries, of a family that has no other tables.
        activation: name in the config of the activation of the gate.
        attention_cap: name in the config of the soft cap of attention's scores; empty for none.
        after_head: entry of `AFTER_HEAD` (llmqat/models/output_head.py), a name in the config; empty for none.
        embedding_scale: name in the config of a factor of the embeddings; empty for none.
        residual_scale: name in the config of a factor of what a branch adds to the residual; empty for none.
        rotary_by_layer_type: whether layers of each type in the config's `layer_types` have rotary tables of their own.
        positions_by_axis: whether positions may be given by time, height and width.
    """

    linears: Mapping[str, Sequence[str]] = field(default_factory=lambda: SEPARATE)
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    norm_offset: float = 0.0
    norm_rounds_once: bool = False
    head_norm: int = OF_HEAD
    neighbours: bool = False
    window: Callable[[Any], int | None] = sees_all
    rotates: Callable[[Any], bool] = rotates_always
    query_scale: Callable[[Any, Tensor], Tensor] | None = None
    activation: str = "hidden_act"
    attention_cap: str = ""
    after_head: str = ""
    embedding_scale: str = ""
    residual_scale: str = ""
    rotary_by_layer_type: bool = False
    positions_by_axis: bool = False


LLAMA = Family()
WINDOWED = replace(LLAMA, window=attrgetter("sliding_window"))
OLMO2 = Family(norms=NORMS_OF_OUTPUTS | HEAD_NORMS, norm_rounds_once=True, head_norm=OF_ALL_HEADS)
GLM = Family(FUSED_GATE, neighbours=True)
GEMMA = Family(
    norms=SANDWICH_NORMS,
    norm_offset=1.0,
    norm_rounds_once=True,
    window=attrgetter("sliding_window"),
    activation="hidden_activation",
    after_head="final_logit_softcapping",
)
FAMILIES = {
    "llama": LLAMA,
    "seed_oss": LLAMA,
    "mistral": replace(LLAMA, window=attrgetter("config.sliding_window")),
    "ministral": WINDOWED,
    "ministral3": replace(LLAMA, window=attrgetter("config.sliding_window"), query_scale=llama4_scale),
    "cwm": WINDOWED,
    "qwen2": WINDOWED,
    "qwen3": replace(WINDOWED, norms=NORMS | HEAD_NORMS),
    "qwen2_vl_text": replace(WINDOWED, positions_by_axis=True),
    "qwen2_5_vl_text": replace(WINDOWED, positions_by_axis=True),
    "qwen3_vl_text": replace(LLAMA, norms=NORMS | HEAD_NORMS, positions_by_axis=True),
    "smollm3": replace(WINDOWED, rotates=attrgetter("use_rope")),
    "granite": replace(
        LLAMA,
        after_head="logits_scaling",
        embedding_scale="embedding_multiplier",
        residual_scale="residual_multiplier",
    ),
    "olmo2": OLMO2,
    "olmo3": replace(OLMO2, window=attrgetter("sliding_window"), rotary_by_layer_type=True),
    "exaone4": Family(norms=NORMS_OF_OUTPUTS | HEAD_NORMS, window=_exaone4_window, rotates=_exaone4_rotates),
    "glm": GLM,
    "glm4": replace(
        GLM,
        norms=NORMS | {"attended_norm": "post_self_attn_layernorm", "mlp_out_norm": "post_mlp_layernorm"},
    ),
    "helium": replace(LLAMA, norm_rounds_once=True, neighbours=True),
    "ernie4_5": replace(LLAMA, neighbours=True),
    "hunyuan_v1_dense": replace(
        LLAMA,
        norms=NORMS | {"q_norm": "self_attn.query_layernorm", "k_norm": "self_attn.key_layernorm"},
        head_norm=OF_ROTATED_HEAD,
    ),
    "phi3": Family(FUSED, window=attrgetter("config.sliding_window")),
    "gemma": replace(LLAMA, norm_offset=1.0, norm_rounds_once=True),
    "gemma2": replace(GEMMA, attention_cap="attn_logit_softcapping"),
    "vaultgemma": replace(
        GEMMA,
        norms={"input_norm": "input_layernorm", "mlp_norm": "pre_feedforward_layernorm"},
        attention_cap="attn_logit_softcapping",
    ),
    "gemma3_text": replace(GEMMA, norms=SANDWICH_NORMS | HEAD_NORMS, rotary_by_layer_type=True),
}


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


def linears_of(layer: Any, family: Family) -> list[Any]:
    """The linear layers of a block, in the order of the table."""
    return [layer.get_submodule(path) for path in family.linears]


def window_of(layer: Any, family: Family) -> int | None:
    """How many tokens a query of this block sees, itself included; None for all."""
    return family.window(layer.self_attn)


def rows_of(family: Family, config: Any, head_dim: int) -> list[list[int]]:
    """For each linear layer of a block, how many rows its parts have."""
    heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads, "v": config.num_key_value_heads}
    sizes = {part: count * head_dim for part, count in heads.items()}
    sizes |= {"gate": config.intermediate_size, "up": config.intermediate_size}
    return [[sizes.get(part, config.hidden_size) for part in parts] for parts in family.linears.values()]


def splits(linear: PackedLinear, rows: Sequence[int]) -> bool:
    """Whether these rows of a packed layer begin at whole words of its zero points, which are packed along them."""
    starts = [sum(rows[:part]) for part in range(len(rows))]
    return linear.weight_zero_point is None or all(start * linear.scheme.bits % 32 == 0 for start in starts)
