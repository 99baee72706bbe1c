"""Quantization-aware training for LLMs: fine-tune at 4 bits, and ship the very model you trained, bit for bit."""

from typing import TYPE_CHECKING, Any

from llmqat.errors import LlmqatError
from llmqat.scheme import QuantScheme
from llmqat.version import __version__ as __version__

if TYPE_CHECKING:
    from llmqat.api import *  # noqa: F403 - names, for tools that read code

__all__ = [
    "Baseline",
    "CoverageReport",
    "Exported",
    "FloatCopy",
    "FloatView",
    "Imported",
    "Inspection",
    "LlmqatError",
    "Perplexity",
    "PrepareOptions",
    "QuantScheme",
    "Smoothed",
    "Throughput",
    "TrainResult",
    "Verification",
    "Windows",
    "add_lora",
    "choose_bits",
    "convert",
    "encode",
    "environment",
    "evaluate",
    "export",
    "finetune",
    "follow_activations",
    "import_checkpoint",
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
    "prepare_from",
    "quantized_by",
    "scoreboard",
    "scored_windows",
    "sequences",
    "smooth",
    "split_stream",
    "throughput",
    "training_kernels",
    "verify",
    "windows",
    "write_page",
]
# Spellings of the version before -> today's names; they go with the next version.
RENAMED = {"blocks": "split_stream"}


def __getattr__(name: str) -> Any:
    """Load the notebook surface on first use: `import llmqat` alone stays light."""
    if name in RENAMED:
        import warnings

        from llmqat.errors import LlmqatDeprecationWarning

        message = f"llmqat.{name} is now llmqat.{RENAMED[name]}; the old name goes with the next version"
        warnings.warn(message, LlmqatDeprecationWarning, stacklevel=2)
        name = RENAMED[name]
    if name not in __all__:
        raise AttributeError(f"module 'llmqat' has no attribute {name!r}")
    from llmqat import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """The public names, for completion."""
    return [*__all__, "__version__"]
