"""Tiny packed models of every family, and how the tests of serving run them."""

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import llmqat
from llmqat.models.patcher import convert
from llmqat.scheme import QuantScheme
from llmqat.serve.forward import accelerate_forward
from tests.conftest import TINY

# Caps that bite at the sizes of tiny random models, and windows shorter than the prompts of the tests.
GEMMA2 = {
    "attn_implementation": "eager",  # the only one of transformers that caps
    "sliding_window": 24,
    "query_pre_attn_scalar": 10,
    "attn_logit_softcapping": 2.0,
    "final_logit_softcapping": 3.0,
}
GEMMA3 = {
    "sliding_window": 24,
    "query_pre_attn_scalar": 10,
    "final_logit_softcapping": 3.0,
    "layer_types": ["sliding_attention", "full_attention"],
}
WINDOWED = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
# Layers of two shapes, of which the last two read the keys and values of the first two.
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 24,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "num_kv_shared_layers": 2,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 128,
    "pad_token_id": 3,
    "final_logit_softcapping": 3.0,
}
GRANITE = {"embedding_multiplier": 1.7, "residual_multiplier": 0.6, "attention_multiplier": 0.4, "logits_scaling": 8.0}
BY_AXIS = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
CONFIGS = {
    "qwen2_vl_text": BY_AXIS,
    "qwen2_5_vl_text": BY_AXIS,
    "qwen3_vl_text": BY_AXIS,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {name: value for name, value in GEMMA4.items() if "per_layer" not in name},
    "granite": GRANITE,
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 16,
            "llama_4_scaling_beta": 0.5,
        }
    },
    "qwen3_5_text": {
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "rope_parameters": BY_AXIS["rope_parameters"] | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5},
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_auto_adjust_ff_dim": False,
        "norm_eps": 0.1,
    },
    "olmo3": WINDOWED,
    "exaone4": WINDOWED,
    "hunyuan_v1_dense": {
        "eod_token_id": 0,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0, "alpha": 50.0},
    },
    "vaultgemma": GEMMA2 | {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral": WINDOWED,
    "cwm": WINDOWED | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "seed_oss": {"attention_out_bias": True},
    "smollm3": WINDOWED | {"use_sliding_window": True, "no_rope_layers": [0, 1]},
}


# Towers for images of patches of 14 pixels.
TOWER = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
IMAGES = {"image_size": 56, "patch_size": 14}
TOWERS = {
    "gemma3": {"vision_config": TOWER | IMAGES, "mm_tokens_per_image": 1, "image_token_id": 120},
    "gemma4": {"image_token_id": 120, "video_token_id": 121, "audio_token_id": 122},
    "gemma4_unified": {"image_token_id": 120, "video_token_id": 121, "audio_token_id": 122},
    "mistral3": {"vision_config": TOWER | IMAGES | {"head_dim": 16}, "image_token_id": 120},
    "qwen2_vl": {"vision_config": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2}},
    "qwen2_5_vl": {
        "vision_config": {"depth": 1, "out_hidden_size": 64, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    },
    "qwen3_5": {
        "vision_config": {"depth": 1, "out_hidden_size": 64, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32}
        | {"num_position_embeddings": 16}
    },
    "qwen3_vl": {
        "vision_config": {"depth": 1, "out_hidden_size": 64, "num_heads": 2, "hidden_size": 32, "intermediate_size": 32}
        | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    },
}
# Families that exist beside towers only -> the models that hold both.
BESIDE = {"qwen2_vl_text": "qwen2_vl", "qwen2_5_vl_text": "qwen2_5_vl", "qwen3_vl_text": "qwen3_vl"}


def tiny_config(family, beside=None, **config):
    """The config of a tiny model of a family, or of one in which it stands beside towers."""
    plain = {"head_dim": 16, "sliding_window": None, "max_position_embeddings": 512, "pad_token_id": None}
    config = TINY | plain | CONFIGS.get(family, {}) | config
    if beside is None:
        return CONFIG_MAPPING[family](**config)
    shared = {name: config[name] for name in ("tie_word_embeddings", "attn_implementation")}
    text = CONFIG_MAPPING[family](**config).to_dict()
    return CONFIG_MAPPING[beside](text_config=text, **TOWERS[beside], **shared)


def float_model(family, beside=None, **config):
    """A tiny random model; with towers where its family exists beside some only."""
    torch.manual_seed(0)
    beside = beside or BESIDE.get(family)
    kind = AutoModelForCausalLM if beside is None else AutoModelForImageTextToText
    return kind.from_config(tiny_config(family, beside, **config)).eval()


def packed_model(family, scheme=None, dtype=torch.float32, kv_bits=None, lm_head_bits=None, **config):
    """A tiny random packed model whose biases and norms are not trivial."""
    model = float_model(family, **config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer += 0.3 * torch.randn_like(buffer)
    model.to(dtype)
    calibration = [torch.arange(16)[None]]
    scheme = scheme or QuantScheme(4, 32)
    llmqat.prepare(model, scheme, calibration=calibration, kv_bits=kv_bits, lm_head_bits=lm_head_bits)
    return convert(model)


def both(model, run):
    """`run()` through transformers, then natively."""
    expected = run()
    assert accelerate_forward(model)
    return expected, run()


def errors(model, logits_of):
    """Of native logits, relative to those of transformers in the same precision: five prompts, a long one first."""
    prompts = [torch.randint(0, 128, (1, tokens)) for tokens in (75, 9, 9, 9, 9)]
    with torch.no_grad():
        expected, logits = both(model, lambda: [logits_of(ids).double() for ids in prompts])
        model.double()
        exact = [logits_of(ids) for ids in prompts]
    pairs = zip(logits, expected, exact, strict=True)
    return torch.stack([(ours - e).norm() / (theirs - e).norm() for ours, theirs, e in pairs])


PROMPT = torch.arange(7)[None] * 11 % 128


def native_blocks(family="llama", **config):
    """A model whose blocks are native, and whose sampling is not yet."""
    model = packed_model(family, **config)
    assert accelerate_forward(model)
    return model


def generate(model, prompt=PROMPT, **options):
    torch.manual_seed(3)
    return model.generate(prompt, **{"max_new_tokens": 20, "do_sample": False, "eos_token_id": -1} | options)


OPTIONS = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "penalized": {"repetition_penalty": 1.8, "no_repeat_ngram_size": 2},
    "shortest": {"min_new_tokens": 9, "eos_token_id": [3, 5]},
}


def rope_options(rope_type):
    """Options of a model with this kind of rotary embedding; 40 tokens are more than a dynamic one was trained for."""
    parameters = {"rope_type": rope_type, "rope_theta": 10000.0}
    if rope_type != "default":
        parameters |= {"factor": 4.0, "original_max_position_embeddings": 16}
    return {"rope_parameters": parameters, "max_position_embeddings": 16 if rope_type == "dynamic" else 64}
