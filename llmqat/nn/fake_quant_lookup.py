"""The fake-quantized lookup: rows of the integer grid in the forward, straight-through gradients in the backward.

The formulas are those of `llmqat.quant.fake_quant`; here ``W_hat`` is found for the rows that are looked up only, which
are bit for bit those that `fake_quantize` gives for the whole matrix.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding

from llmqat.kernels.grid_rows import latents_at
from llmqat.quant.fake_quant import grid_gradients
from llmqat.quant.grid import Grid, Latent
from llmqat.scheme import QuantScheme


class _Gradients(NamedTuple):
    """The gradient of each argument of `_FakeQuantRows.forward`, in order."""

    latent: Tensor
    scale: Tensor
    zero_point: Tensor | None
    code_scale: None = None
    exact: None = None
    scheme: None = None
    storage_dtype: None = None
    clip_mask: None = None
    out_dtype: None = None


class _FakeQuantRows(torch.autograd.Function):
    """``W_hat`` of some rows; the gradient of `latent` is that of `exact`, the same rows as they are quantized."""

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        code_scale: Tensor | None,
        exact: Tensor,
        scheme: QuantScheme,
        storage_dtype: torch.dtype,
        clip_mask: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(exact, scale, zero_point, code_scale)
        ctx.constants, ctx.clip_mask = (scheme, storage_dtype), clip_mask
        grid = Grid(scale, zero_point, code_scale, scheme, storage_dtype).stored()
        return grid.dequantize(grid.code_values(exact)).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> _Gradients:
        exact, *tensors = ctx.saved_tensors
        grid = Grid(*tensors, *ctx.constants).widened(exact.dtype)
        dw, ds, dz = grid_gradients(grad.to(exact.dtype), exact, grid, ctx.clip_mask)
        return _Gradients(dw, ds, None if grid.zero_point is None else dz)


@torch.compiler.disable
def fake_quant_embedding(
    ids: Tensor,
    latent: Latent,
    grid: Grid,
    out_dtype: torch.dtype,
    *,
    padding_idx: int | None = None,
    clip_mask: bool = False,
) -> Tensor:
    """Rows of ``W_hat`` for token ids of any shape, ``(*ids.shape, in)`` in `out_dtype`.

    Differentiable like `fake_quant_linear`, whose arguments `latent`, `grid` and `clip_mask` are.

    Args:
        ids: token ids.
        latent: the matrix that is quantized, ``(vocabulary, in)``.
        grid: its scales and zero points.
        out_dtype: dtype of the result.
        padding_idx: this row gets no gradient from the lookup; None for all rows.
        clip_mask: stop the gradient of weights beyond the ends of the grid.
    """
    flat = ids.flatten()
    rows = embedding(flat, latent.weight, padding_idx)
    exact = latents_at(latent, grid, flat)
    if latent.adapters is not None:  # for the gradient only
        a, b, scaling = latent.adapters
        with torch.autocast(ids.device.type, enabled=False):
            rows = rows + scaling * (b[flat] @ a)
    scale, zero_point, code_scale, *constants = grid.rows(flat)
    result: Tensor = _FakeQuantRows.apply(rows, scale, zero_point, code_scale, exact, *constants, clip_mask, out_dtype)
    return result.view(*ids.shape, latent.weight.shape[1])
