"""Where a model decodes text: the decoder stack inside it, and what a model with towers does around that."""

from typing import Any

# Models with towers for images or sound whose text the native loop samples, by their model type: they hand the
# embeddings of its tokens to their stack, its hidden states to the head, and nothing else happens to either.
PLAIN_AROUND = frozenset(("gemma3", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"))


def stack_of(model: Any) -> Any:
    """The decoder stack of a model: what embeds text, and runs the blocks and the last norm; None if it has none."""
    find = getattr(model, "get_decoder", None)
    stack = None if find is None else find()
    return None if stack is model or not hasattr(stack, "layers") else stack


def has_towers(model: Any) -> bool:
    """Whether the decoder stack of a model is only a part of what lies below its output head."""
    return stack_of(model) is not model.base_model


def why_not_sampled(model: Any) -> str:
    """Why the native loop does not sample a model whose blocks may run natively; empty if it does."""
    kind = model.config.model_type
    plain = not has_towers(model) or kind in PLAIN_AROUND
    return "" if plain else f"the native loop does not know what a model of type {kind} does around its blocks"
