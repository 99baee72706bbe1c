"""Arithmetic that gives the same bits on every GPU and in Triton's interpreter: rounding, clamping, storing.

Why not the shorter ways: ``x.to(tl.bfloat16)`` truncates in the interpreter, where ``libdevice.rint`` is missing;
``floor(x + 0.5)`` is half up; ``/`` errs by 2 ulp on NVIDIA; `tl.minimum` drops NaN, by which one sees that a run
diverged.
"""

from typing import Any

import torch
import triton
import triton.language as tl

# Passed at each launch: no multiplication and addition is made one rounding unless `tl.fma` asks for it.
EXACT = {"enable_fp_fusion": False}

# 1.5 * 2^23: adding it leaves no bit below the integers, and rounds half to even, of anything below 2^22.
_HALF_EVEN = tl.constexpr(12582912.0)
_FAR_OUT = tl.constexpr(1048576.0)  # beyond every code, and small enough for _HALF_EVEN

# Whether the interpreter runs the kernels: it has no rounding to bfloat16, for which GPUs have an instruction.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

TRITON_DTYPES: dict[torch.dtype, Any] = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@triton.jit
def clamp(x, low, high):
    """`x` between two numbers; NaN stays NaN."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def round_half_even(x):
    """`x`, float32, rounded to an integer, halves to even; beyond 2^20 its end, NaN stays NaN."""
    near = clamp(x, -_FAR_OUT, _FAR_OUT)
    return (near + _HALF_EVEN) - _HALF_EVEN


@triton.jit
def rounded_to(x, dtype: tl.constexpr):
    """`x`, float32, rounded to the nearest number of `dtype`, still in float32."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        near = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.where(x == x, near, x)  # the sum may carry the bits of a NaN into those of a zero
    elif dtype == tl.float16:
        return x.to(tl.float16).to(tl.float32)
    else:
        return x


@triton.jit
def nearest(x, dtype: tl.constexpr):
    """`x`, float32, as the nearest number of `dtype`, in `dtype`; on GPUs by one instruction, ``cvt.rn`` on NVIDIA."""
    if INTERPRETED:
        x = rounded_to(x, dtype)
    return x.to(dtype)


@triton.jit
def quotient(x, y):
    """``x / y`` rounded once, as IEEE has it; `y` has the shape of `x` or is to be broadcast to it."""
    return tl.div_rn(x, tl.broadcast_to(y, x.shape))
