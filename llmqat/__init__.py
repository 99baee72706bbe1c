"""llmqat fine-tunes a language model through its own integer grid, and ships exactly what it trained."""

from typing import TYPE_CHECKING, Any

from llmqat.errors import LlmqatError
from llmqat.scheme import QuantScheme
from llmqat.version import __version__ as __version__

if TYPE_CHECKING:
    from llmqat.api import (
        FloatCopy,
        FloatView,
        Windows,
        add_lora,
        blocks,
        convert,
        encode,
        environment,
        evaluate,
        finetune,
        follow_activations,
        inspect,
        load,
        load_corpus,
        load_float,
        load_tokenizer,
        observe_activations,
        pack,
        peak_memory,
        perplexity,
        prepare,
        scoreboard,
        scored_windows,
        sequences,
        smooth,
        throughput,
        verify,
        windows,
        write_page,
    )

__all__ = [
    "FloatCopy",
    "FloatView",
    "LlmqatError",
    "QuantScheme",
    "Windows",
    "add_lora",
    "blocks",
    "convert",
    "encode",
    "environment",
    "evaluate",
    "finetune",
    "follow_activations",
    "inspect",
    "load",
    "load_corpus",
    "load_float",
    "load_tokenizer",
    "observe_activations",
    "pack",
    "peak_memory",
    "perplexity",
    "prepare",
    "scoreboard",
    "scored_windows",
    "sequences",
    "smooth",
    "throughput",
    "verify",
    "windows",
    "write_page",
]


def __getattr__(name: str) -> Any:
    """Load the notebook surface on first use: `import llmqat` alone stays light."""
    if name not in __all__:
        raise AttributeError(f"module 'llmqat' has no attribute {name!r}")
    from llmqat import api

    return getattr(api, name)
