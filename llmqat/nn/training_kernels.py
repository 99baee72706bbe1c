"""All compiled kernels of training at once, for models that train."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from llmqat.kernels import training
from llmqat.kernels.attention import has_attention
from llmqat.kernels.products import has_tiles
from llmqat.nn.native_attention import native_attention
from llmqat.nn.native_modules import native_modules


@contextmanager
def training_kernels(*models: nn.Module) -> Iterator[None]:
    """Run attention, norms, gates and rotary embeddings of models by the compiled kernels inside the ``with``.

    `llmqat.finetune` does so by itself, and `llmqat.prepare` with GPTQ or block-wise reconstruction; a loop of your own
    may say ``with llmqat.training_kernels(model):``. Quantized layers use the kernels with and without it. Results are
    those of transformers, to rounding; what the kernels do not take, and all of it where they are off
    (``LLMQAT_TRAINING=torch``), runs as before.

    Args:
        models: those that run: the one that trains, and its teacher.

    Returns:
        a context manager.
    """
    with native_modules(*models), native_attention():
        yield


def explain() -> str:
    """One line: which kernels training uses on this machine's CPU, or why none."""
    if training.is_off():
        return f"torch: {training.SWITCH}=torch is set"
    if training.library() is None:
        return "torch: there are no compiled kernels"
    if has_tiles() and has_attention():
        return "products and attention in AMX tiles, all else of a step compiled; optimizers of torch"
    return "products and attention of torch, as there is no AMX; all else of a step compiled; optimizers of torch"
