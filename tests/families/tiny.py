"""Tiny models of all kinds of causal language models that transformers has, made by the names of their sizes.

Most configs call the same size by one of a few names; `SIZES` sets those that a config has. What is left is in
`EXCEPTIONS`.
"""

from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

PADDING = 1  # no text holds it
VOCABULARY, HIDDEN, WIDE, LAYERS, HEADS, POSITIONS = 128, 64, 96, 2, 4, 160


def named(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **named(VOCABULARY, "vocab_size vocab_size_per_layer_input unpadded_vocab_size ngram_vocab_size_base"),
    **named(HIDDEN, "hidden_size d_model n_embd dim emb_dim embedding_size word_embed_proj_dim attention_hidden_size"),
    **named(LAYERS, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **named(LAYERS, "num_decoder_layers num_encoder_layers"),
    **named(HEADS, "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads"),
    **named(HEADS, "num_decoder_attention_heads num_encoder_attention_heads index_n_heads linear_num_value_heads"),
    **named(HEADS, "swa_num_attention_heads linear_num_heads"),
    **named(2, "num_key_value_heads linear_num_key_heads swa_num_key_value_heads"),
    **named(WIDE, "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim dim_ff d_ff dff hidden_dim"),
    **named(WIDE, "d_inner ffn_hidden_size shared_intermediate_size moe_shared_expert_intermediate_size"),
    **named(POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len seq_length context_length rel_extent"),
    **named(POSITIONS, "index_topk"),  # scores of zero are many, and which of equal ones are chosen is open
    **named(0.15, "initializer_range init_std"),
    # Experts.
    **named(4, "num_experts num_local_experts n_routed_experts moe_num_experts"),
    **named(2, "num_experts_per_tok moe_topk moe_k top_k_experts"),
    **named(48, "moe_intermediate_size shared_expert_intermediate_size"),
    **named(1, "n_group topk_group num_expert_group first_k_dense_replace"),
    # Latent attention and its index.
    **named(32, "q_lora_rank kv_lora_rank o_lora_rank index_head_dim"),
    **named(16, "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim swa_head_dim linear_head_dim"),
    **named(16, "sliding_window sliding_window_size attention_window"),
    # Linear attention and state-space layers.
    **named(16, "linear_key_head_dim linear_value_head_dim state_size time_step_rank mamba_d_state mamba_dt_rank"),
    **named(16, "mamba_d_head mamba_headdim mamba_head_dim ssm_state_size hidden_size_per_layer_input"),
    **named(8, "mamba_n_heads n_mamba_heads mamba_num_heads"),
    **named(1, "mamba_n_groups n_groups mamba_ngroups"),
    **named(128, "mamba_d_ssm"),
    **named(1e-9, "time_step_min"),  # a step behind a cache ignores it in two families
    **named(HIDDEN, "lru_width adapter_in_dim adapter_input_size adapter_out_dim downsample_hidden_size"),
    **named(True, "is_decoder"),
    **named(0, "num_nextn_predict_layers bos_token_id eos_token_id decoder_start_token_id"),
    **named(PADDING, "pad_token_id"),
}
ROTARY, HEAD = {"rotary_dim": 16}, {"head_dim": 16}
TWICE = {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 2 * HIDDEN // HEADS}
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "codegen": ROTARY,
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0},
        "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": WIDE, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "use_dsa": True,
        "shared_experts_intermediate_size": 48,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": HEADS,
        **named(32, "swa_q_lora_rank swa_kv_lora_rank swa_head_dim"),
        **named(16, "swa_qk_nope_head_dim swa_qk_rope_head_dim swa_v_head_dim"),
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "intermediate_size": [WIDE] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "num_kv_shared_layers": 2,
        "laurel_rank": 16,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": ROTARY,
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"L_cycles": 1},
    "hunyuan_v1_dense": HEAD,
    "hunyuan_v1_moe": HEAD,
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 2,
    },
    "inkling_text": {"n_shared_experts": 1},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": HEAD,
    "nemotron": {"num_key_value_heads": HEADS},
    "qwen4_exp_text": {
        "indexer_budget": POSITIONS,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 16,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_embds": False,
        "attn_layers": ["local", "local"],
        "local_attn_chunk_length": 8,
        "attention_head_size": 16,
    },
    "xlnet": {"d_head": 16},
    "xlstm": {"qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "youtu": {"pad_token_id": None},  # transformers zeroes its row of the embedding whenever it loads
    # Their shared block reads hidden states beside the embeddings.
    "zamba": TWICE | {"num_hidden_layers": 3, "layer_types": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": TWICE | {"hybrid_layer_ids": [1], "adapter_rank": 16, "num_mem_blocks": 1},
    "zaya": {"num_experts_per_tok": 1},
}
# Why there is no tiny model of a kind, where trying it does not say.
UNMADE = {
    "blt": "tables of 3 GB, into which its bytes are hashed whatever the config says",
    "gemma4_assistant": "it runs behind another model, whose keys and values it reads",
    "gemma4_unified_assistant": "it runs behind another model, whose keys and values it reads",
    "musicgen": "the config of its decoder is not the one that AutoModelForCausalLM is given",
    "musicgen_melody": "the config of its decoder is not the one that AutoModelForCausalLM is given",
}
PARTS = ("text_config", "vision_config", "audio_config")
# Sizes that a config has a setter for, which says no.
UNSETTABLE = {"prophetnet": ("num_hidden_layers",), "xlnet": ("max_position_embeddings",)}
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def settable(config: PreTrainedConfig, name: str) -> bool:
    kind = getattr(type(config), config.attribute_map.get(name, name), None)
    return not isinstance(kind, property) or kind.fset is not None


def value_of(config: PreTrainedConfig, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except Exception:  # one that differs by layer
        return 0


def sizes_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Small values of all sizes that `config` has, and a layer of each kind."""
    sizes = {
        name: small
        for name, small in SIZES.items()
        if settable(config, name)
        and name not in UNSETTABLE.get(config.model_type, ())
        and hasattr(type(config), name) | (name in vars(config)) | (value_of(config, name) is not None)
        and not isinstance(value_of(config, name), list | dict)
        and (value_of(config, name) is not None or name.endswith("token_id"))
    }
    if {"q_lora_rank", "kv_lora_rank"} & sizes.keys() and "num_key_value_heads" in sizes:
        sizes["num_key_value_heads"] = HEADS
    for name in ("layer_types", "mlp_layer_types"):
        kinds = list(dict.fromkeys(value_of(config, name) or ()))
        if kinds and settable(config, name):
            if name == "layer_types":
                sizes["num_hidden_layers"] = max(LAYERS, len(kinds))
            sizes[name] = (kinds * LAYERS * 4)[: sizes.get("num_hidden_layers", LAYERS)]
    return sizes


def tiny_config(model_type: str) -> PreTrainedConfig:
    """The config of a tiny model of a family."""
    default = CONFIG_MAPPING[model_type]()
    sizes = sizes_of(default)
    for part in PARTS:
        config = value_of(default, part)
        if isinstance(config, PreTrainedConfig):
            sizes[part] = type(config)(**sizes_of(config) | EXCEPTIONS.get(config.model_type, {})).to_dict()
    return CONFIG_MAPPING[model_type](**sizes | EXCEPTIONS.get(model_type, {}))


def tiny_model(model_type: str) -> PreTrainedModel:
    """A random model in evaluation mode, its norms and biases not trivial."""
    if model_type in UNMADE:
        raise ValueError(UNMADE[model_type])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(model_type), dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model
