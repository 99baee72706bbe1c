"""Matrix products of bfloat16 in the tiles of a CPU that has them (AMX), summed in float32; elsewhere torch's own.

A training step multiplies three ways, and two of them read a matrix across: the outputs ``x W^T``, the gradient of the
input ``g W``, and that of the weight ``g^T x``.
"""

import ctypes
import math
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import native, training

RESULTS = (torch.bfloat16, torch.float32)
# Fewer rows, columns or terms of a sum leave tiles half empty: torch's products are as fast.
LEAST = 16


class Operand(ctypes.Structure):
    """`llmqat_operand` of csrc/core/training.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
    )


class Product(ctypes.Structure):
    """`llmqat_product` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("c", "bias")),
        *((name, ctypes.c_int32) for name in ("dtype", "accumulate")),
    )


def has_tiles() -> bool:
    """Whether products run in tiles here."""
    kernels = training.library()
    return kernels is not None and bool(kernels.llmqat_has_tiles())


def in_tiles(a: Tensor, b: Tensor) -> bool:
    """Whether the product `multiply` makes runs in tiles: bfloat16, on a CPU with AMX, and not too thin."""
    known = a.dtype == b.dtype == torch.bfloat16 and training.readable(a, b)
    return known and min(math.prod(a.shape[:-1]), *b.shape) >= LEAST and has_tiles()


def multiply(a: Tensor, b: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """``a @ b + bias`` of matrices, or views that transpose them; no gradient.

    Args:
        a: the left one, ``(m, k)``, or ``(..., k)``.
        b: the right one, ``(k, n)``.
        bias: ``(n,)``, or None.
        dtype: of the result, by default theirs. float32 keeps the sums of bfloat16 products as they are.
    """
    dtype = dtype or a.dtype
    if not in_tiles(a, b) or dtype not in RESULTS:
        return torch.nn.functional.linear(a, b.T, bias if bias is None else bias.to(a.dtype)).to(dtype)
    product = torch.empty(*a.shape[:-1], b.shape[1], dtype=dtype)
    _run(a if a.ndim == 2 else a.reshape(-1, a.shape[-1]), b, bias, product, accumulate=False)
    return product


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``, in place: float32 ``(m, n)``, contiguous; matrices as in `multiply`."""
    if in_tiles(a, b) and total.dtype == torch.float32 and total.is_contiguous():
        _run(a, b, None, total, accumulate=True)
    else:
        total += a @ b


def _run(a: Tensor, b: Tensor, bias: Tensor | None, product: Tensor, accumulate: bool) -> None:
    left, right = _readable(a), _readable(b)
    bias = None if bias is None else bias.float().contiguous()
    out = Product(training.pointer(product), training.pointer(bias), native.DTYPES[product.dtype], accumulate)
    operands = [Operand(training.pointer(matrix), *matrix.shape, *matrix.stride()) for matrix in (left, right)]
    training.call("llmqat_multiply", *map(ctypes.byref, operands), ctypes.byref(out))


def _readable(matrix: Tensor) -> Tensor:
    """`matrix`, or a copy of it where its values lie apart in both directions."""
    (rows, columns), (down, across) = matrix.shape, matrix.stride()
    fits = (across == 1 and down >= columns) or (down == 1 and across >= rows)
    return matrix if fits else matrix.contiguous()


class _Linear(torch.autograd.Function):
    """``x W^T + bias`` of a matrix `x`, with its gradients in tiles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return multiply(x, weight.T, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            multiply(grad, weight) if need_x else None,
            multiply(grad.T, x) if need_weight else None,
            grad.sum(0, dtype=ctx.bias_dtype) if need_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` with its products in tiles, differentiable in all arguments.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``, of the dtype of `x`.
        bias: ``(out,)`` or None.
    """
    rows = x.reshape(-1, x.shape[-1])
    if not in_tiles(rows, weight.T):
        return torch.nn.functional.linear(x, weight, bias)
    y: Tensor = _Linear.apply(rows, weight, bias)
    return y.unflatten(0, x.shape[:-1]) if x.ndim != 2 else y
