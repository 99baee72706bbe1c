"""Attention of training in bfloat16 tiles, forward and backward; torch's own takes what these kernels do not."""

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.kernels import training
from llmqat.kernels.training import call, pointer

MOST_DIM = 256  # of a head
LEAST_QUERIES = 16  # fewer are no work for tiles


class Heads(ctypes.Structure):
    """`llmqat_heads` of csrc/core/training.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("sequence_stride", "head_stride", "row_stride")),
    )


class Attention(ctypes.Structure):
    """`llmqat_attention` of csrc/core/training.h."""

    _fields_ = (
        *((name, Heads) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("log_sum", "seen")),
        *(
            (name, ctypes.c_int64)
            for name in ("seen_stride", "sequences", "heads", "kv_heads", "queries", "keys", "head_dim")
        ),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


class Gradients(ctypes.Structure):
    """`llmqat_attention_gradients` of csrc/core/training.h."""

    _fields_ = tuple((name, Heads) for name in ("out", "q", "k", "v"))


class Softmax(NamedTuple):
    """Between the scores ``q k^T`` and their softmax.

    Attributes:
        seen: ``(sequences or 1, queries, 2)`` int32: the keys ``[first, end)`` that a query sees.
        scale: factor of the scores.
        softcap: ``softcap * tanh(x / softcap)`` of the scaled scores x, unless that is 0.
    """

    seen: Tensor
    scale: float
    softcap: float = 0.0


def has_attention() -> bool:
    """Whether attention of training runs in tiles here."""
    kernels = training.library()
    return kernels is not None and bool(kernels.llmqat_has_attention())


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels take these shapes, ``(sequences, heads, length, head_dim)``, and are worth it."""
    dim = q.shape[-1]
    return (
        has_attention()
        and q.device.type == "cpu"
        and q.dim() == 4
        and k.shape == v.shape
        and dim == k.shape[-1]
        and dim % 16 == 0
        and dim <= MOST_DIM
        and q.shape[0] == k.shape[0]
        and q.shape[1] % k.shape[1] == 0
        and q.shape[2] >= LEAST_QUERIES
    )


@lru_cache(maxsize=16)
def seen_by_all(queries: int, keys: int, causal: bool) -> Tensor:
    """The keys that queries see without a mask, ``(1, queries, 2)``: up to their own place if `causal`, else all."""
    ends = torch.arange(1, queries + 1).clamp(max=keys) if causal else torch.full((queries,), keys)
    return torch.stack([torch.zeros_like(ends), ends], 1).to(torch.int32)[None]


def seen_by_mask(mask: Tensor) -> Tensor | None:
    """The keys that queries see by a mask, ``(sequences, 1, queries, keys)`` of bool, where each sees a run of them.

    That is so with causal masks, windows, padding at either end, and packed sequences.
    """
    if mask.stride(-1) != 1:
        mask = mask.contiguous()
    sequences, _, queries, keys = mask.shape
    seen = torch.empty((sequences, queries, 2), dtype=torch.int32)
    sizes = (ctypes.c_int64 * 3)(sequences, queries, keys)
    strides = (ctypes.c_int64 * 2)(mask.stride(0), mask.stride(2))
    kernels = training.library()
    assert kernels is not None
    places = (ctypes.c_void_p(mask.data_ptr()), sizes, strides, ctypes.c_void_p(seen.data_ptr()))
    return seen if kernels.llmqat_seen_keys(*places) else None


def attend(q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
    """Attention ``(sequences, queries, heads, head_dim)`` of q ``(sequences, heads, queries, head_dim)`` over k and v
    ``(sequences, kv_heads, keys, head_dim)``, all in bfloat16. A query that sees no key gets zeros."""
    attended: Tensor = _Attend.apply(*(_with_rows(x) for x in (q, k, v)), softmax)  # type: ignore[no-untyped-call]
    return attended


def _with_rows(x: Tensor) -> Tensor:
    """A tensor whose last dimension is contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _heads(x: Tensor) -> Heads:
    """The strides of ``(sequences, heads, length, head_dim)``."""
    return Heads(x.data_ptr(), *x.stride()[:3])


def _by_rows(like: Tensor) -> Tensor:
    """Memory for ``(sequences, heads, length, head_dim)``, rows outside of heads: what a projection reads or writes."""
    sequences, heads, length, dim = like.shape
    return like.new_empty((sequences, length, heads, dim)).transpose(1, 2)


def _attention(q: Tensor, k: Tensor, v: Tensor, out: Tensor, log_sum: Tensor | None, softmax: Softmax) -> Attention:
    seen, scale, softcap = softmax
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    stride = 0 if seen.shape[0] == 1 else seen.stride(0)
    return Attention(*map(_heads, (q, k, v, out)), pointer(log_sum), seen.data_ptr(), stride, *sizes, scale, softcap)


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, softmax: Softmax) -> Tensor:
        out, log_sum = _by_rows(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        call("llmqat_attend", ctypes.byref(_attention(q, k, v, out, log_sum, softmax)))
        ctx.save_for_backward(q, k, v, out, log_sum)
        ctx.softmax = softmax
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sum = ctx.saved_tensors
        dq, dk, dv = _by_rows(q), _by_rows(k), _by_rows(v)
        d_out = _with_rows(d_out).transpose(1, 2)  # named, so that it outlives the call
        gradients = Gradients(*map(_heads, (d_out, dq, dk, dv)))
        attention = _attention(q, k, v, out, log_sum, ctx.softmax)
        call("llmqat_attend_backward", ctypes.byref(attention), ctypes.byref(gradients))
        return dq, dk, dv, None
