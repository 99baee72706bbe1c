"""The kinds of linear layer: `nn.Linear`, and GPT-2's `Conv1D`, which keeps its weight as ``(in, out)``."""

from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

LINEAR_LAYERS = (nn.Linear, Conv1D)


def is_transposed(layer: nn.Module | None) -> bool:
    """Whether a layer keeps its weight as ``(in, out)``."""
    return isinstance(layer, Conv1D)


def linear_shape(layer: nn.Module) -> tuple[int, int]:
    """``(out, in)`` of one of `LINEAR_LAYERS`."""
    weight: Any = layer.weight  # no Parameter where it is computed from others
    rows, columns = weight.shape
    return (columns, rows) if is_transposed(layer) else (rows, columns)
