"""The sum that LoRA adds to a weight, by one order of operations, so that codes do not depend on the machine.

For each rank in turn, one fused multiply-add in float32. The compiled kernels (csrc/shared/adapters.inc) and those of
GPUs (kernels/gpu/grid_rows.py) do the same; a library's matrix product sums in an order of its own, which changes with
the processor, the number of rows and the version. Here is what torch does where neither runs.
"""

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 16  # a chunk of float64 numbers (512 KiB) stays in the L2 cache


def sum_in_order(b: Tensor, a: Tensor) -> Tensor:
    """``b @ a``, ``(rows, in)``, each entry summed from the first rank to the last; no gradient.

    In float32 each product and sum is rounded once: the product of two float32 numbers is exact in float64. (The sum is
    rounded to float64 and then to float32, which about once in 2^29 sums is not the nearest number.) On mps, which has
    no float64, and of float64 itself, product and sum are each rounded.

    Args:
        b: ``(rows, r)``, float32 or wider.
        a: ``(r, in)``, of the same dtype.
    """
    total = torch.empty(len(b), a.shape[1], dtype=a.dtype, device=a.device)
    height = max(1, CHUNK_ELEMENTS // a.shape[1])
    for start in range(0, len(b), height):
        rows = slice(start, start + height)
        if a.dtype == torch.float32 and a.device.type != "mps":
            _add_fused(total[rows], b[rows].double(), a.double())
        else:
            _add_rounded(total[rows], b[rows], a)
    return total


@torch.no_grad()
def _add_fused(total: Tensor, b: Tensor, a: Tensor) -> None:
    wide = torch.zeros_like(total, dtype=torch.float64)
    for of_rows, of_columns in zip(b.T.unsqueeze(-1), a, strict=True):
        wide.addcmul_(of_rows, of_columns)
        total.copy_(wide)
        wide.copy_(total)


@torch.no_grad()
def _add_rounded(total: Tensor, b: Tensor, a: Tensor) -> None:
    total.zero_()
    for of_rows, of_columns in zip(b.T.unsqueeze(-1), a, strict=True):
        total += of_rows * of_columns
