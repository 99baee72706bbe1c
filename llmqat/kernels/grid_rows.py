"""Weights on their grid by the compiled kernels: ``W_hat`` bit for bit as torch finds it, and gradients.

What the kernels do not know (float64, other devices, rows divided among processes) torch computes.
"""

import ctypes
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.kernels import native, training
from llmqat.quant.fake_quant import fake_quantize as in_torch
from llmqat.quant.grid import CHUNK_ELEMENTS, Compensation, Grid, Latent, lacks_values


class GridRows(ctypes.Structure):
    """`llmqat_grid` of csrc/core/training.h."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("weight", "added", "multiples", "step", "scale", "code_scale", "zero_point")
        ),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups")),
        *((name, ctypes.c_int32) for name in ("weight_dtype", "scale_dtype", "qmin", "qmax")),
    )


def is_known(latent: Latent, grid: Grid, out_dtype: torch.dtype) -> bool:
    """Whether the kernels run here, and know the dtypes of a weight, and of its ``W_hat``."""
    weight, change = latent.weight, latent.compensation
    known = {grid.storage_dtype, out_dtype} <= native.DTYPES.keys()
    narrow = change is None or change.multiples.dtype == torch.int8
    return known and narrow and latent.shard is None and not lacks_values() and training.readable(weight)


@torch.no_grad()
def fake_quantize(latent: Latent, grid: Grid, out_dtype: torch.dtype | None = None) -> Tensor:
    """`llmqat.quant.fake_quant.fake_quantize`, by the kernels where they know the weight."""
    if not is_known(latent, grid, out_dtype or grid.storage_dtype):
        return in_torch(latent, grid, out_dtype)
    rows, w_hat = _Rows.of(latent, grid), torch.empty(latent.weight.shape, dtype=out_dtype or grid.storage_dtype)
    for part in rows.parts():
        out = w_hat[part.rows]
        training.call(
            "llmqat_fake_quantize", ctypes.byref(part.struct), training.pointer(out), native.DTYPES[out.dtype]
        )
    return w_hat


@torch.no_grad()
def grid_gradients(
    g: Tensor, latent: Latent, grid: Grid, out_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Gradient of the scales ``(out, groups)`` float32, and ``W_hat`` beside it, whose codes are found only once.

    Args:
        g: gradient of ``W_hat``, ``(out, in)`` float32; it becomes that of the latents.
        latent: the weight, of which `is_known` holds.
        grid: its grid.
        out_dtype: of ``W_hat``; None for no ``W_hat``.
    """
    rows, ds = _Rows.of(latent, grid), torch.empty(grid.scale.shape, dtype=torch.float32)
    w_hat = None if out_dtype is None else torch.empty(latent.weight.shape, dtype=out_dtype)
    for part in rows.parts():
        out = None if w_hat is None else w_hat[part.rows]
        pointers = map(training.pointer, (g[part.rows], ds[part.rows], out))
        dtype = native.DTYPES[out_dtype or torch.float32]
        training.call("llmqat_grid_gradients", ctypes.byref(part.struct), *pointers, dtype)
    return ds, w_hat


_kept = threading.local()


def _memory(columns: int) -> Tensor:
    """Float32 memory of this thread for a chunk of rows: new memory is dear, since its pages come one by one."""
    size = max(CHUNK_ELEMENTS, columns)
    if getattr(_kept, "memory", None) is None or len(_kept.memory) < size:
        _kept.memory = torch.empty(size)
    memory: Tensor = _kept.memory
    return memory


class _Part(NamedTuple):
    """Some rows of a weight: the struct of the kernels, and the tensors that it borrows."""

    rows: slice
    struct: GridRows
    borrowed: tuple[Tensor | None, ...]


class _Rows(NamedTuple):
    """A weight and its grid as the kernels read them, contiguous."""

    latent: Latent
    grid: Grid

    @staticmethod
    def of(latent: Latent, grid: Grid) -> "_Rows":
        """The stored grid of a weight, in the dtypes of the kernels."""
        stored, change = grid.stored(), latent.compensation
        wide = [None if x is None else x.float().contiguous() for x in (stored.zero_point, stored.code_scale)]
        grid = stored._replace(scale=stored.scale.contiguous(), zero_point=wide[0], code_scale=wide[1])
        if change is not None:
            change = Compensation(change.multiples.contiguous(), change.step.bfloat16().contiguous())
        return _Rows(latent._replace(weight=latent.weight.contiguous(), compensation=change), grid)

    def parts(self) -> Iterator[_Part]:
        """All rows at once; with adapters, whose product rounds by chunks, chunk by chunk."""
        if self.latent.adapters is None:
            yield self._part(slice(0, len(self.latent.weight)), None)
            return
        memory = _memory(self.latent.weight.shape[1])
        for rows in self.latent.chunks():
            yield self._part(rows, self.latent.added(rows, torch.float32, memory))

    def _part(self, rows: slice, added: Tensor | None) -> _Part:
        scale, zero_point, code_scale, scheme, _ = self.grid.rows(rows)
        change = self.latent.compensation
        multiples, step = (None, None) if change is None else (change.multiples[rows], change.step[rows])
        weight = self.latent.weight[rows]
        borrowed = (weight, added, multiples, step, scale, code_scale, zero_point)
        sizes = (*weight.shape, scale.shape[1])
        dtypes = (native.DTYPES[weight.dtype], native.DTYPES[scale.dtype])
        struct = GridRows(*map(training.pointer, borrowed), *sizes, *dtypes, scheme.qmin, scheme.qmax)
        return _Part(rows, struct, borrowed)
