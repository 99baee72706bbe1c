"""Everything that the native decoder knows about model families, as data. A family whose block it computes is a row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels.decoder import OF_ALL_HEADS, OF_HEAD, OF_ROTATED_HEAD

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
SIDE = {"per_layer_input_gate": ("side_gate",), "per_layer_projection": ("side_up",)}
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
# Norms of what a block may lack.
OPTIONAL_NORMS = ("q_norm", "k_norm", "v_norm", "side_norm")
# The argument of a stack for the side inputs of its blocks, where these have some.
SIDE_ARGUMENT = "per_layer_inputs"
# Activation of the gate, as configs name it -> `Activation` of csrc/core/steps.h.
ACTIVATIONS = {"silu": 0, "gelu_pytorch_tanh": 1}
# Rotary tables that all layers share, those of queries that are scaled by position, and the empty ones of layers that
# turn nothing.
SHARED, QUERIES, UNROTATED = "shared", "queries", "unrotated"


def sees_all(_: Any) -> int | None:
    """Window of attention modules without one."""
    return None


def never(_: Any) -> bool:
    """Sharing of keys and values, in families whose blocks have their own."""
    return False


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
        mixer: name in a block of a module that stands in the place of attention, and that torch runs; empty for none.
        output_gate: whether q gives a gate of what each head attends, too.
        norms: norm of csrc/core/decoder.h -> its path in a block.
        scale: path in a block of a factor of what it gives; empty for none.
        shares: from an attention module to whether it reads keys and values of the last block of its type before it.
        side_size: name in the config of how many features the side input of a block has, which the stack makes by
            `get_per_layer_inputs` and `project_per_layer_inputs`; empty for none.
        last_norm: name in the decoder stack of the norm behind the blocks.
        eps: name in the config of what norms add to the mean of squares.
        norm_offset: 1 where a norm multiplies by 1 + weight.
        norm_rounds_once: whether norms round only their product with the weight.
        head_norm: which norms those of q and k are (csrc/core/steps.h).
        neighbours: whether the rotary embedding turns pairs of neighbours; else a feature of each half.
        window: from an attention module to how many tokens a query sees, itself included; None for all.
        rotates: from an attention module to whether it rotates queries and keys.
        query_scale: from the config and positions to factors of the queries, of a family that has no other tables.
        activation: name in the config of the activation of the gate; empty for SiLU.
        attention_cap: name in the config of the soft cap of attention's scores; empty for none.
        after_head: entry of `AFTER_HEAD` (llmqat/models/output_head.py), a name in the config; empty for none.
        embedding_scale: name in the config of a factor of the embeddings; empty for none.
        residual_scale: name in the config of a factor of what a branch adds to the residual; empty for none.
        rotary_by_layer_type: whether layers of each type in the config's `layer_types` have rotary tables of their own.
        follows: options of the config that only this family has, and that show in its modules.
        harmless: options of the config -> values of theirs that change nothing here.
        positions_by_axis: whether positions may be given by time, height and width.
    """

    linears: Mapping[str, Sequence[str]] = field(default_factory=lambda: SEPARATE)
    mixer: str = ""
    output_gate: bool = False
    norms: Mapping[str, str] = field(default_factory=lambda: NORMS)
    scale: str = ""
    shares: Callable[[Any], bool] = never
    side_size: str = ""
    last_norm: str = "norm"
    eps: str = "rms_norm_eps"
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
    follows: frozenset[str] = frozenset()
    harmless: Mapping[str, Sequence[Any]] = field(default_factory=dict)


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
GEMMA4 = Family(
    SEPARATE | SIDE,
    norms=SANDWICH_NORMS | HEAD_NORMS | {"v_norm": "self_attn.v_norm", "side_norm": "post_per_layer_input_norm"},
    scale="layer_scalar",
    shares=attrgetter("is_kv_shared_layer"),
    side_size="hidden_size_per_layer_input",
    norm_rounds_once=True,
    window=attrgetter("sliding_window"),
    activation="hidden_activation",
    after_head="final_logit_softcapping",
    rotary_by_layer_type=True,
    follows=frozenset(
        [
            "attention_k_eq_v",
            "num_kv_shared_layers",
            "use_double_wide_mlp",
            "vocab_size_per_layer_input",
            "per_layer_config",
        ]
    ),
    harmless={"use_bidirectional_attention": (None, "vision")},  # it comes as a mask
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
    "qwen3_5_text": Family(
        mixer="linear_attn",
        output_gate=True,
        norms=NORMS | HEAD_NORMS,
        norm_offset=1.0,
        norm_rounds_once=True,
        positions_by_axis=True,
        follows=frozenset(
            [
                "linear_conv_kernel_dim",
                "linear_key_head_dim",
                "linear_value_head_dim",
                "linear_num_key_heads",
                "linear_num_value_heads",
            ]
        ),
    ),
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
    "lfm2": Family(
        {
            "self_attn.q_proj": ("q",),
            "self_attn.k_proj": ("k",),
            "self_attn.v_proj": ("v",),
            "self_attn.out_proj": ("o",),
            "feed_forward.w1": ("gate",),
            "feed_forward.w3": ("up",),
            "feed_forward.w2": ("down",),
        },
        mixer="conv",
        norms={
            "input_norm": "operator_norm",
            "mlp_norm": "ffn_norm",
            "q_norm": "self_attn.q_layernorm",
            "k_norm": "self_attn.k_layernorm",
        },
        last_norm="embedding_norm",
        eps="norm_eps",
        activation="",
        follows=frozenset(
            [
                "conv_bias",
                "conv_L_cache",
                "full_attn_idxs",
                "block_multiple_of",
                "block_ffn_dim_multiplier",
                "block_auto_adjust_ff_dim",
            ]
        ),
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
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": replace(GEMMA4, linears=SEPARATE, side_size=""),
}
