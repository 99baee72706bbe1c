"""RMSNorm of training in compiled kernels: one pass forward, one backward, on CPUs of any instruction set."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.kernels import training
from llmqat.kernels.native import DTYPES


class Convention(NamedTuple):
    """How a family computes ``x / sqrt(mean(x^2) + eps) * (offset + weight)``.

    Attributes:
        eps: added to the mean square.
        offset: added to the weight, in float32: 1 in Gemma.
        rounds_once: only the product is rounded, to the dtype of `x` (Gemma, OLMo 2); else what the weight multiplies
            is rounded to that, and the product has the wider dtype of the two (Llama).
    """

    eps: float
    offset: float = 0.0
    rounds_once: bool = False


class RmsNorm(ctypes.Structure):
    """`llmqat_rms_norm` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "y", "inverse", "g", "dx", "dweight")),
        *((name, ctypes.c_int64) for name in ("rows", "count")),
        *((name, ctypes.c_float) for name in ("eps", "offset")),
        *((name, ctypes.c_int32) for name in ("rounds_once", "x_dtype", "weight_dtype", "y_dtype")),
    )


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernels run here and take a norm of these tensors."""
    return training.readable(x, weight) and x.ndim > 0 and weight.shape == x.shape[-1:] and weight.is_contiguous()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def rms_norm(x: Tensor, weight: Tensor, convention: Convention) -> Tensor:
    """RMSNorm over the last dimension, differentiable in both tensors; `takes` has said yes.

    Args:
        x: ``(..., count)``.
        weight: ``(count,)``.
        convention: of the family.
    """
    y: Tensor = _RmsNorm.apply(x, weight, convention)  # type: ignore[no-untyped-call]
    return y


def _struct(x: Tensor, weight: Tensor, y_dtype: torch.dtype, convention: Convention) -> RmsNorm:
    dtypes = (DTYPES[dtype] for dtype in (x.dtype, weight.dtype, y_dtype))
    nothing = (None,) * 5
    rows = x.numel() // max(x.shape[-1], 1)
    return RmsNorm(x.data_ptr(), weight.data_ptr(), *nothing, rows, x.shape[-1], *convention, *dtypes)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, convention: Convention) -> Tensor:
        x = training.dense(x)
        ctx.convention = convention
        ctx.y_dtype = x.dtype if convention.rounds_once else torch.promote_types(x.dtype, weight.dtype)
        y, inverse = torch.empty_like(x, dtype=ctx.y_dtype), torch.empty(x.shape[:-1])
        norm = _struct(x, weight, ctx.y_dtype, convention)
        norm.y, norm.inverse = y.data_ptr(), inverse.data_ptr()
        training.call("llmqat_norm_forward", ctypes.byref(norm))
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse = ctx.saved_tensors
        need_x, need_weight, _ = ctx.needs_input_grad
        g = training.laid_out_like(g, x)
        dx = torch.empty_like(x) if need_x else None
        dweight = torch.empty(weight.shape) if need_weight else None
        norm = _struct(x, weight, ctx.y_dtype, ctx.convention)
        norm.inverse, norm.g = inverse.data_ptr(), g.data_ptr()
        norm.dx, norm.dweight = training.pointer(dx), training.pointer(dweight)
        training.call("llmqat_norm_backward", ctypes.byref(norm))
        return dx, None if dweight is None else dweight.to(weight.dtype), None
