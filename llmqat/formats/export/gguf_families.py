"""The model families that GGUF export knows, as data: what is written, and what llama.cpp takes for granted.

llama.cpp computes some things by the name of an architecture alone. A row's `requires` says which, so that a config
that wants otherwise is refused, where it would be computed wrong without a word.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.models.gguf_config import attention_scalar

# Method of `gguf.GGUFWriter` -> entry of the config.
COMMON = {
    "add_block_count": "num_hidden_layers",
    "add_embedding_length": "hidden_size",
    "add_feed_forward_length": "intermediate_size",
    "add_head_count": "num_attention_heads",
    "add_head_count_kv": "num_key_value_heads",
    "add_layer_norm_rms_eps": "rms_norm_eps",
    "add_vocab_size": "vocab_size",
}
ROTARY = ("default", "linear", "llama3")


def _usual_scale(config: Any) -> bool:
    """Whether Gemma's attention is scaled as llama.cpp does."""
    return bool(config.query_pre_attn_scalar == attention_scalar(config))


def _windows_every(period: int) -> Callable[[Any], bool]:
    """Whether all layers but each `period`-th see a window."""
    return lambda config: all(
        (kind == "full_attention") == ((index + 1) % period == 0) for index, kind in enumerate(config.layer_types)
    )


@dataclass(frozen=True)
class GgufFamily:
    """A model family.

    Attributes:
        architecture: its name in GGUF.
        interleaved: whether llama.cpp rotates neighbouring features of queries and keys, where transformers rotates
            features half a head apart: their rows then trade places.
        norm_offset: what transformers adds to the weight of each norm.
        activation: of the MLP.
        keys: further methods of the writer -> entries of the config.
        windowed: whether llama.cpp knows the family's attention windows; else the context ends with the window.
        requires: what llama.cpp takes for granted -> whether a config has it so.
    """

    architecture: str
    interleaved: bool = False
    norm_offset: float = 0.0
    activation: tuple[str, ...] = ("silu",)
    keys: tuple[tuple[str, str], ...] = ()
    windowed: bool = False
    requires: tuple[tuple[str, Callable[[Any], bool]], ...] = ()


LLAMA = GgufFamily("llama", interleaved=True)
WINDOW, CAP = ("add_sliding_window", "sliding_window"), ("add_final_logit_softcapping", "final_logit_softcapping")
TIED = ("the output head is tied to the embedding", lambda config: bool(config.tie_word_embeddings))
USUAL_SCALE = ("query_pre_attn_scalar is the head dimension", _usual_scale)

GEMMA = GgufFamily("gemma", norm_offset=1.0, activation=("gelu_pytorch_tanh",))

# config.model_type -> row. Fused q, k, v and gate, up of Phi-3 are one tensor there too.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": GgufFamily("qwen2"),
    "qwen3": GgufFamily("qwen3"),
    "phi3": GgufFamily("phi3"),
    "gemma": replace(GEMMA, requires=(TIED,)),
    "gemma2": replace(
        GEMMA,
        architecture="gemma2",
        keys=(WINDOW, CAP, ("add_attn_logit_softcapping", "attn_logit_softcapping")),
        windowed=True,
        requires=(TIED, USUAL_SCALE, ("every second layer sees all tokens", _windows_every(2))),
    ),
    "gemma3_text": replace(
        GEMMA,
        architecture="gemma3",
        keys=(WINDOW, CAP),
        windowed=True,
        requires=(USUAL_SCALE, ("every sixth layer sees all tokens", _windows_every(6))),
    ),
}


def family_of(config: Any) -> GgufFamily:
    """The row of a model's config.

    Raises:
        LlmqatError: if there is none, or llama.cpp would compute another model than the config describes.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise LlmqatError(
            f"gguf export does not know the model type {config.model_type!r} (known: {', '.join(FAMILIES)}); export to "
            "dense, and convert that with the tools of llama.cpp"
        )
    found = getattr(config, "hidden_activation", None) or config.hidden_act
    wrong = [text for text, holds in family.requires if not holds(config)]
    if found not in family.activation:
        wrong.append(f"the activation is {family.activation[0]}")
    kinds = {rope.get("rope_type", "default") for rope in rotary(config).values()}
    if not kinds <= set(ROTARY):
        wrong.append(f"the rotary embedding is {' or '.join(ROTARY)}")
    if wrong:
        raise LlmqatError(
            f"llama.cpp takes for granted of a {config.model_type} that {wrong[0]}, and this one is otherwise; export "
            "to dense, or serve it with llmqat.load"
        )
    return family


def rotary(config: Any) -> dict[str, dict[str, Any]]:
    """The parameters of the rotary embedding by the kind of attention; a family with one kind has full attention."""
    parameters = config.rope_parameters
    kinds = {kind: values for kind, values in parameters.items() if isinstance(values, dict)}
    return kinds or {"full_attention": parameters}


def add_metadata(writer: Any, config: Any, family: GgufFamily) -> None:
    """Write the numbers of a model's config by the `gguf.GGUFWriter`."""
    for method, entry in (*COMMON.items(), *family.keys):
        value = getattr(config, entry, None)
        if value is not None:
            getattr(writer, method)(value)
    head = head_dim(config)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(int(head * rotary_share(config)))
    window = None if family.windowed else getattr(config, "sliding_window", None)
    writer.add_context_length(min(window or config.max_position_embeddings, config.max_position_embeddings))
    kinds = rotary(config)
    writer.add_rope_freq_base(kinds["full_attention"]["rope_theta"])
    if "sliding_attention" in kinds:
        writer.add_rope_freq_base_swa(kinds["sliding_attention"]["rope_theta"])
    if kinds["full_attention"].get("rope_type") == "linear":
        writer.add_rope_scaling_type(_linear_scaling())
        writer.add_rope_scaling_factor(kinds["full_attention"]["factor"])


def _linear_scaling() -> Any:
    from gguf import RopeScalingType

    return RopeScalingType.LINEAR


def head_dim(config: Any) -> int:
    """Features of an attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def rotary_share(config: Any) -> float:
    """Share of a head's features that are rotated."""
    return float(rotary(config)["full_attention"].get("partial_rotary_factor", 1.0))


def rotary_divisors(config: Any, inv_freq: Tensor) -> Tensor | None:
    """The divisors by which Llama 3's scaling lowers the frequencies of the rotary embedding, float32 ``(head / 2,)``;
    None for others.

    Args:
        config: of the model.
        inv_freq: the frequencies that transformers computes with.
    """
    full = rotary(config)["full_attention"]
    if full.get("rope_type") != "llama3":
        return None
    exponents = torch.arange(0, 2 * len(inv_freq), 2, dtype=torch.float64) / (2 * len(inv_freq))
    divisors: Tensor = full["rope_theta"] ** -exponents / inv_freq.double()
    return divisors.float()


def swap_halves(rows: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection, so that features which are rotated together become neighbours."""
    halves: Tensor = rows.unflatten(0, (heads, 2, -1))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()
