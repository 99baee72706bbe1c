"""Entries of a model's config that transformers leaves at the defaults of a family, whatever a GGUF file says."""

import math
from typing import Any

import numpy as np

from llmqat.errors import LlmqatError

# Key of the metadata, behind the architecture -> entry of the config.
ENTRIES = {
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
# Llama 3's scaling of rotary frequencies, of which a file holds only what comes of it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
REMEDY = "start from the model in safetensors that the file was made of"


def correct(config: Any, facts: dict[str, Any], divisors: Any, name: str) -> None:
    """Give a config what a GGUF file says beyond what transformers reads of it.

    Args:
        config: as `AutoConfig` makes it of the file; changed.
        facts: the metadata of the file.
        divisors: of rotary frequencies, the tensor ``rope_freqs.weight``; None where the file has none.
        name: of the file, for messages.

    Raises:
        LlmqatError: if the file scales rotary frequencies in a way that is not known.
    """
    architecture = facts["general.architecture"]
    for key, entry in ENTRIES.items():
        said = facts.get(f"{architecture}.{key}")
        if said is not None and hasattr(config, entry):
            setattr(config, entry, said)
    if hasattr(config, "query_pre_attn_scalar"):
        config.query_pre_attn_scalar = attention_scalar(config)
    if config.model_type == "mistral":  # llama.cpp runs it as a Llama, which sees all tokens
        config.sliding_window = None
    scaling = facts.get(f"{architecture}.rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise LlmqatError(f"{name} scales rotary frequencies by {scaling!r}, which is not known here; {REMEDY}")
    if divisors is not None:
        config.rope_parameters = {**config.rope_parameters, **_llama3(config, divisors, name)}
    elif scaling == "linear":
        factor = facts[f"{architecture}.rope.scaling.factor"]
        config.rope_parameters = _full_attention(config.rope_parameters, {"rope_type": "linear", "factor": factor})


def attention_scalar(config: Any) -> int:
    """The scalar under the root by which llama.cpp scales Gemma's attention: of a head, or by the width of the largest
    models."""
    largest = config.num_hidden_layers in (46, 62)
    return int(config.hidden_size // config.num_attention_heads if largest else config.head_dim)


def _full_attention(parameters: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The parameters of the rotary embedding with `changes` to those of full attention."""
    if "full_attention" not in parameters:
        return parameters | changes
    return parameters | {"full_attention": parameters["full_attention"] | changes}


def _llama3(config: Any, divisors: Any, name: str) -> dict[str, Any]:
    """The parameters of Llama 3's scaling by which the rotary frequencies have these `divisors`."""
    found = {"rope_type": "llama3", "factor": round(float(np.max(divisors)), 3), **LLAMA3}
    exponents = np.arange(len(divisors)) / len(divisors)
    turns = LLAMA3["original_max_position_embeddings"] * config.rope_parameters["rope_theta"] ** -exponents / math.tau
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    if not np.allclose(1 / (kept + (1 - kept) / found["factor"]), divisors, rtol=1e-3):
        raise LlmqatError(f"{name} scales rotary frequencies otherwise than Llama 3 does; {REMEDY}")
    return found
