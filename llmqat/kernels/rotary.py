"""Rotary embedding of training in compiled kernels, forward and backward in one pass each (arXiv 2104.09864)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import training
from llmqat.kernels.native import DTYPES

MOST_DIM = 512  # of a head


class Rotation(ctypes.Structure):
    """`llmqat_rotation` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cosine", "sine", "y")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length", "dim", "rotary")),
        *((name, ctypes.c_int64 * 3) for name in ("x_strides", "y_strides")),
        ("table_stride", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("x_dtype", "y_dtype", "table_dtype", "back")),
    )


def takes(x: Tensor, cosine: Tensor, sine: Tensor) -> bool:
    """Whether the kernels run here and take this rotation; tables with a gradient they do not."""
    if not training.readable(x, cosine, sine) or x.ndim != 4 or cosine.ndim != 3:
        return False
    batch, heads, length, dim = x.shape
    fits = cosine.shape[0] in (1, batch) and cosine.shape[1] == length and cosine.shape[2] in range(2, dim + 1, 2)
    same = cosine.shape == sine.shape and cosine.dtype == sine.dtype
    return fits and same and heads > 0 and dim <= MOST_DIM and not (cosine.requires_grad or sine.requires_grad)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Heads whose first features turn by their place, differentiable in `x`; `takes` has said yes.

    Feature ``i`` and the one half of the table further on are a pair; features beyond the table stay.

    Args:
        x: ``(batch, heads, length, dim)``, of any strides.
        cosine: ``(batch or 1, length, rotary)``.
        sine: like `cosine`.
    """
    y: Tensor = _Rotate.apply(x, cosine, sine)  # type: ignore[no-untyped-call]
    return y


def _rotate(x: Tensor, tables: tuple[Tensor, Tensor], dtype: torch.dtype, back: bool) -> Tensor:
    x = x if x.stride(-1) == 1 else x.contiguous()
    cosine, sine = (table.contiguous() for table in tables)
    y = torch.empty_like(x, dtype=dtype)
    y = y if y.stride(-1) == 1 else torch.empty(x.shape, dtype=dtype)
    shared = cosine.shape[0] == 1
    rotation = Rotation(
        *(tensor.data_ptr() for tensor in (x, cosine, sine, y)),
        *x.shape,
        cosine.shape[-1],
        *((ctypes.c_int64 * 3)(*tensor.stride()[:3]) for tensor in (x, y)),
        0 if shared else cosine.stride(0),
        *(DTYPES[tensor.dtype] for tensor in (x, y, cosine)),
        back,
    )
    training.call("llmqat_rotate", ctypes.byref(rotation))
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        ctx.x_dtype = x.dtype
        return _rotate(x, (cosine, sine), torch.promote_types(x.dtype, cosine.dtype), back=False)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(g, ctx.saved_tensors, ctx.x_dtype, back=True), None, None
