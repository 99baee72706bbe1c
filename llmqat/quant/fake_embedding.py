"""The fake-quantized lookup: rows of the integer grid in the forward, straight-through gradients in the backward.

The formulas are those of `llmqat.quant.fake_quant`; here ``W_hat`` is found for the rows that are looked up only, which
are bit for bit those that `fake_quantize` gives for the whole matrix.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from llmqat.quant.affine import code_values, dequantize
from llmqat.quant.fake_quant import grid_gradients, latent_rows, rounded_zero_point, row_chunks
from llmqat.scheme import QuantScheme


def latent_at(
    ids: Tensor,
    weight: Tensor,
    compensation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scaling: float,
) -> Tensor:
    """Rows `ids` ``(n,)`` of the latent weight, ``(n, in)``; no gradient.

    With adapters they come from whole chunks of rows: a product of other rows may round otherwise.
    """
    if lora_a is None or lora_b is None:
        latent = weight[ids].to(torch.promote_types(weight.dtype, torch.float32))
        return latent if compensation is None else latent + compensation[ids]
    latent = torch.empty(len(ids), weight.shape[1], dtype=torch.float32, device=weight.device)
    for rows in row_chunks(*weight.shape):
        wanted = ((ids >= rows.start) & (ids < rows.stop)).nonzero().squeeze(-1)
        if len(wanted):
            chunk = latent_rows(rows, weight, compensation, lora_a, lora_b, lora_scaling)
            latent[wanted] = chunk[ids[wanted] - rows.start].to(latent.dtype)
    return latent


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
        scale_dtype: torch.dtype,
        clip_mask: bool,
        out_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(exact, scale, zero_point, code_scale)
        ctx.options = (scheme, scale_dtype, clip_mask)
        s = scale.to(scale_dtype)
        z = None if zero_point is None else rounded_zero_point(zero_point, scheme)
        codes = code_values(exact, s if code_scale is None else code_scale, z, scheme)
        return dequantize(codes, s, z, scheme).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exact, scale, zero_point, code_scale = ctx.saved_tensors
        scheme, scale_dtype, clip_mask = ctx.options
        s = scale.to(scale_dtype).to(exact.dtype).unsqueeze(-1)
        s0 = None if code_scale is None else code_scale.to(exact.dtype).unsqueeze(-1)
        z = torch.zeros_like(s) if zero_point is None else rounded_zero_point(zero_point, scheme).unsqueeze(-1)
        dw, ds, dz = grid_gradients(grad.to(exact.dtype), exact, s, s0, z, scheme, clip_mask)
        return dw, ds, None if zero_point is None else dz, *[None] * 6


@torch.compiler.disable
def fake_quant_embedding(
    ids: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    out_dtype: torch.dtype,
    *,
    padding_idx: int | None = None,
    code_scale: Tensor | None = None,
    compensation: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    clip_mask: bool = False,
) -> Tensor:
    """Rows of ``W_hat`` for token ids of any shape, ``(*ids.shape, in)`` in `out_dtype`, differentiable like
    `fake_quant_linear`, whose arguments these are; the row `padding_idx` gets no gradient from here.
    """
    flat = ids.flatten()
    latent = embedding(flat, weight, padding_idx)
    with torch.no_grad():
        exact = latent_at(flat, weight, compensation, lora_a, lora_b, lora_scaling)
    if lora_a is not None and lora_b is not None:  # for the gradient only
        with torch.autocast(ids.device.type, enabled=False):
            latent = latent + lora_scaling * (lora_b[flat] @ lora_a)
    grid = (None if tensor is None else tensor[flat] for tensor in (scale, zero_point, code_scale))
    result: Tensor = _FakeQuantRows.apply(latent, *grid, exact, scheme, scale_dtype, clip_mask, out_dtype)
    return result.view(*ids.shape, weight.shape[1])
