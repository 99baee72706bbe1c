"""Weights on their grid by the kernels of their device: ``W_hat`` bit for bit as torch finds it, and gradients.

Compiled kernels on a CPU, Triton's on a GPU. What they do not know (float64, other devices) torch computes.
"""

import ctypes
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.kernels import native, training
from llmqat.kernels.adapter_sums import sum_in_order
from llmqat.kernels.gpu import available
from llmqat.quant import fake_quant as in_torch
from llmqat.quant.grid import CHUNK_ELEMENTS, Compensation, Grid, Latent, lacks_values


class GridGradients(NamedTuple):
    """Gradients of a grid, and ``W_hat``, whose codes are found only once; None for what is not made.

    Attributes:
        scale: ``(out, groups)``, float32 or wider.
        zero_point: ``(out, groups)``, float32 or wider.
        w_hat: ``(out, in)``.
    """

    scale: Tensor | None = None
    zero_point: Tensor | None = None
    w_hat: Tensor | None = None


@torch.no_grad()
def fake_quantize(latent: Latent, grid: Grid, out_dtype: torch.dtype | None = None) -> Tensor:
    """`llmqat.quant.fake_quant.fake_quantize` by the kernels."""
    out_dtype = out_dtype or grid.storage_dtype
    gpu = _on_gpu(latent, grid, out_dtype)
    if gpu is not None:
        w_hat: Tensor = gpu.fake_quantize(latent, grid, out_dtype)
        return w_hat
    if not _on_cpu(latent, grid, out_dtype):
        return in_torch.fake_quantize(latent, grid, out_dtype)
    rows, w_hat = _Rows.of(latent, grid), torch.empty(latent.weight.shape, dtype=out_dtype)
    for part in rows.parts():
        out = w_hat[part.rows]
        training.call(
            "llmqat_fake_quantize", ctypes.byref(part.struct), training.pointer(out), native.DTYPES[out.dtype]
        )
    return w_hat


def codes_of(latent: Latent, grid: Grid) -> Tensor:
    """`llmqat.quant.fake_quant.codes_of` by the kernels of GPUs: those of the forward."""
    gpu = _on_gpu(latent, grid)
    if gpu is None:
        return in_torch.codes_of(latent, grid, sum_in_order)
    codes: Tensor = gpu.codes_of(latent, grid)
    return codes


def count_clipped(latent: Latent, grid: Grid) -> Tensor:
    """`llmqat.quant.fake_quant.count_clipped` by the kernels of GPUs."""
    gpu = _on_gpu(latent, grid)
    count: Tensor = (
        in_torch.count_clipped(latent, grid, sum_in_order) if gpu is None else gpu.count_clipped(latent, grid)
    )
    return count


@torch.no_grad()
def latents_at(latent: Latent, grid: Grid, ids: Tensor) -> Tensor:
    """Rows `ids` ``(n,)`` of the sum that the forward quantizes, ``(n, in)``, float32 or wider."""
    gpu = _on_gpu(latent, grid)
    rows: Tensor = latent.rows(ids, sum_in_order) if gpu is None else gpu.latents_of(latent, grid, ids)
    return rows


@torch.no_grad()
def merge(latent: Latent, grid: Grid) -> None:
    """Write the sum that the forward quantizes into the weight itself."""
    gpu = _on_gpu(latent, grid)
    if gpu is not None:
        latent.weight.copy_(gpu.latents_of(latent, grid))
        return
    for rows in latent.chunks():
        latent.weight[rows] = latent.rows(rows, sum_in_order)


def grid_gradients(
    g: Tensor,
    latent: Latent,
    grid: Grid,
    *,
    clip_mask: bool = False,
    zero_point: bool = False,
    out_dtype: torch.dtype | None = None,
) -> GridGradients:
    """Gradients of scales and zero points from that of ``W_hat``; see `llmqat.quant.fake_quant` for the formulas.

    Args:
        g: gradient of ``W_hat``, ``(out, in)``, float32 or wider; it becomes that of the latents.
        latent: the weight.
        grid: its grid.
        clip_mask: stop gradients of weights beyond the ends of the grid.
        zero_point: whether zero points train.
        out_dtype: of ``W_hat``, which is made where that is cheap; None for no ``W_hat``.
    """
    wanted = torch.float32 if out_dtype is None else out_dtype
    gpu = _on_gpu(latent, grid, wanted)
    if gpu is not None:
        w_hat = None if out_dtype is None else torch.empty_like(g, dtype=out_dtype)
        of_zero = torch.empty_like(grid.scale, dtype=g.dtype) if zero_point else None
        made = GridGradients(torch.empty_like(grid.scale, dtype=g.dtype), of_zero, w_hat)
        gpu.grid_gradients(g, latent, grid, made, clip_mask)
        return made
    if clip_mask or zero_point or not _on_cpu(latent, grid, wanted):
        return _gradients_in_torch(g, latent, grid, clip_mask)
    return _gradients_on_cpu(g, latent, grid, out_dtype)


def _on_gpu(latent: Latent, grid: Grid, out_dtype: torch.dtype = torch.float32) -> Any:
    """The Triton kernels, if they run on the device of a weight and know its dtypes; else None."""
    if lacks_values() or not available.runs_on(latent.weight.device):
        return None
    from llmqat.kernels.gpu import grid_rows as gpu

    return gpu if gpu.takes(latent, grid, out_dtype) else None


def _on_cpu(latent: Latent, grid: Grid, out_dtype: torch.dtype) -> bool:
    """Whether the compiled kernels run here, and know the dtypes of a weight, and of its ``W_hat``."""
    weight, change = latent.weight, latent.compensation
    known = {grid.storage_dtype, out_dtype} <= native.DTYPES.keys()
    narrow = change is None or change.multiples.dtype == torch.int8
    return known and narrow and not lacks_values() and training.readable(weight)


@torch.no_grad()
def _gradients_in_torch(g: Tensor, latent: Latent, grid: Grid, clip_mask: bool) -> GridGradients:
    ds, dz = torch.empty_like(grid.scale), torch.empty_like(grid.scale)
    wide = grid.widened(g.dtype)
    for rows in latent.chunks():
        values = latent.rows(rows, sum_in_order)
        g[rows], ds[rows], dz[rows] = in_torch.grid_gradients(g[rows], values, wide.rows(rows), clip_mask)
    return GridGradients(ds, dz)


@torch.no_grad()
def _gradients_on_cpu(g: Tensor, latent: Latent, grid: Grid, out_dtype: torch.dtype | None) -> GridGradients:
    rows, ds = _Rows.of(latent, grid), torch.empty(grid.scale.shape, dtype=torch.float32)
    w_hat = None if out_dtype is None else torch.empty(latent.weight.shape, dtype=out_dtype)
    for part in rows.parts():
        out = None if w_hat is None else w_hat[part.rows]
        pointers = map(training.pointer, (g[part.rows], ds[part.rows], out))
        dtype = native.DTYPES[out_dtype or torch.float32]
        training.call("llmqat_grid_gradients", ctypes.byref(part.struct), *pointers, dtype)
    return GridGradients(ds, None, w_hat)


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
        """All rows at once; with adapters chunk by chunk, so that their sums stay in cache."""
        adapters = self.latent.own_adapters
        if adapters is None:
            yield self._part(slice(0, len(self.latent.weight)), None)
            return
        b, a = adapters.factors(torch.float32)
        memory = _memory(self.latent.weight.shape[1])
        for rows in self.latent.chunks():
            yield self._part(rows, sum_in_order(b[rows], a, memory))

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
