"""Where a model decodes text: the decoder stack inside it, and what a model with towers does around that."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Around:
    """How a model with towers hands embeddings of text to its stack, and hidden states to its head.

    Attributes:
        placeholders: names in its config of tokens in whose place it reads padding, where no tower gives anything else.
        follows_head: whether it does to the logits what the text model of its stack does; else nothing.
    """

    placeholders: tuple[str, ...] = ()
    follows_head: bool = False


PLAIN = Around()
GEMMA4 = Around(("image_token_id", "video_token_id", "audio_token_id"), follows_head=True)
# Models with towers for images or sound whose text the native loop samples, by their model type.
AROUND = {
    "gemma3": PLAIN,
    "gemma4": GEMMA4,
    "gemma4_unified": GEMMA4,
    "mistral3": PLAIN,
    "qwen2_vl": PLAIN,
    "qwen2_5_vl": PLAIN,
    "qwen3_vl": PLAIN,
    "qwen3_5": PLAIN,
}


def stack_of(model: Any) -> Any:
    """The decoder stack of a model: what embeds text, and runs the blocks and the last norm; None if it has none."""
    find = getattr(model, "get_decoder", None)
    stack = None if find is None else find()
    return None if stack is model or not hasattr(stack, "layers") else stack


def has_towers(model: Any) -> bool:
    """Whether the decoder stack of a model is only a part of what lies below its output head."""
    return stack_of(model) is not model.base_model


def around(model: Any) -> Around | None:
    """The row of what a model does around its decoder stack; None if that is not known."""
    return AROUND.get(model.config.model_type) if has_towers(model) else Around(follows_head=True)


def read_as(model: Any) -> dict[int, int]:
    """Tokens -> those that a model reads in their place."""
    known, padding = around(model), model.config.get_text_config().pad_token_id
    return {getattr(model.config, name): padding for name in known.placeholders} if known is not None else {}


def why_not_sampled(model: Any) -> str:
    """Why the native loop does not sample a model whose blocks may run natively; empty if it does."""
    kind, known = model.config.model_type, around(model) is not None
    return "" if known else f"the native loop does not know what a model of type {kind} does around its blocks"
