"""The optimizers of the loop: torch's fused AdamW, and the 8-bit ones of bitsandbytes."""

from typing import Any

import torch

from llmqat.errors import LlmqatError
from llmqat.progress import log

BETAS = (0.9, 0.95)
# Name on the command line -> class of bitsandbytes.optim.
EIGHT_BIT = {"adamw8bit": "AdamW8bit", "paged_adamw8bit": "PagedAdamW8bit"}


def make_optimizer(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """AdamW without weight decay over parameter groups that carry their learning rates.

    The 8-bit ones keep both moments in 8 bits per value, in blocks with a scale each (arXiv 2110.02861); tensors of
    fewer than 4096 values keep theirs in float32.

    Args:
        name: one of `llmqat.config.OPTIMIZERS`.
        groups: see `llmqat.train.modes.parameter_groups`.

    Raises:
        LlmqatError: if bitsandbytes is needed and not installed.
    """
    if name == "adamw":
        return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=True)
    kind = getattr(_bitsandbytes(name).optim, EIGHT_BIT[name])
    if name.startswith("paged") and not groups[0]["params"][0].is_cuda:
        log("paged_adamw8bit pages between CUDA devices and the CPU; without a CUDA device it is adamw8bit")
        kind = _bitsandbytes(name).optim.AdamW8bit
    optimizer: torch.optim.Optimizer = kind(groups, betas=BETAS, weight_decay=0.0)
    return optimizer


def _bitsandbytes(name: str) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise LlmqatError(
            f"--optimizer {name} needs bitsandbytes: pip install 'llmqat[bitsandbytes]', or use --optimizer adamw"
        ) from error
    return bitsandbytes
