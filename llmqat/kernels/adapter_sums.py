"""The sum that LoRA adds to a weight by the compiled kernels: the bits of `llmqat.quant.adapter_sums`."""

import ctypes

import torch
from torch import Tensor

from llmqat.kernels import training
from llmqat.quant import adapter_sums as in_torch
from llmqat.quant.grid import lacks_values


class AdapterSums(ctypes.Structure):
    """`llmqat_adapter_sums` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("b", "a", "sums")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "rank")),
    )


@torch.no_grad()
def sum_in_order(b: Tensor, a: Tensor, memory: Tensor | None = None) -> Tensor:
    """``b @ a``, ``(rows, in)``, each entry summed from the first rank to the last.

    Args:
        b: ``(rows, r)``, float32 or wider.
        a: ``(r, in)``, of the same dtype.
        memory: float32 numbers, at least as many as the sums, where they are written if the kernels make them; or None.
    """
    if a.dtype != torch.float32 or lacks_values() or not training.readable(a, b):
        return in_torch.sum_in_order(b, a)
    a, b, (rows, columns) = a.contiguous(), b.contiguous(), (len(b), a.shape[1])
    sums = torch.empty(rows, columns) if memory is None else memory[: rows * columns].view(rows, columns)
    struct = AdapterSums(*map(training.pointer, (b, a, sums)), rows, columns, len(a))
    training.call("llmqat_sum_adapters", ctypes.byref(struct))
    return sums
