"""Weights on their integer grid, and the gradients that pass through it straight.

With a latent weight ``W`` (see `Latent`), a stored scale ``s``, an integer zero point ``z`` and the code scale
``s0`` (``s0 = s`` unless it was set apart):

    v = W / s0          u = round(v) + z          q = clamp(u, qmin, qmax)          W_hat = s * (q - z)

`round` (of v, of z, and of s to its storage dtype) passes gradients straight through. ``m`` is the derivative taken for
the clamp: 1 everywhere, or with `clip_mask` 1 inside the range and 0 outside. For ``G = dL/dW_hat``:

    dW = m * G * s / s0
    ds = sum over the group of  G * (q - z - m * v)    where s0 = s: the learned step of LSQ (arXiv 1902.08153, eq. 3)
         sum over the group of  G * (q - z)            where s0 is apart: codes do not move with the scale
                                                       (EfficientQAT's E2E-QP, arXiv 2407.11062, section 3.3)
    dz = sum over the group of  -s * G * (1 - m)
"""

import torch
from torch import Tensor

from llmqat.quant.adapter_sums import sum_in_order
from llmqat.quant.affine import grouped
from llmqat.quant.grid import Grid, Latent, Product


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer with input `x` computes: that of autocast where autocast is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@torch.no_grad()
def fake_quantize(latent: Latent, grid: Grid, out_dtype: torch.dtype | None = None) -> Tensor:
    """``dequantize(quantize(latent))``, ``(out, in)``, in `out_dtype` (by default the storage dtype); no gradient.

    Of a latent of some rows, those rows.
    """
    weight, grid = latent.weight, grid.stored()
    out = torch.empty(weight.shape, dtype=out_dtype or grid.storage_dtype, device=weight.device)
    for rows in latent.chunks():
        part = grid.rows(rows)
        out[rows] = part.dequantize(part.code_values(latent.rows(rows)))
    return out


@torch.no_grad()
def codes_of(latent: Latent, grid: Grid, product: Product = sum_in_order) -> Tensor:
    """The codes of `fake_quantize`, ``(out, in)``: int8 for a symmetric scheme, else uint8."""
    weight, grid = latent.weight, grid.stored()
    dtype = torch.int8 if grid.scheme.symmetric else torch.uint8
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in latent.chunks():
        codes[rows] = grid.rows(rows).code_values(latent.rows(rows, product)).to(dtype)
    return codes


@torch.no_grad()
def count_clipped(latent: Latent, grid: Grid, product: Product = sum_in_order) -> Tensor:
    """How many latent weights lie more than half a code beyond the ends of the grid, a scalar on their device."""
    grid, (low, high) = grid.stored(), (grid.scheme.qmin - 0.5, grid.scheme.qmax + 0.5)
    s0 = grid.scale_of_codes
    count = torch.zeros((), dtype=torch.int64, device=latent.weight.device)
    for rows in latent.chunks():
        u = grouped(latent.rows(rows, product), grid.scheme) / s0[rows, :, None]
        if grid.zero_point is not None:
            u = u + grid.zero_point[rows, :, None]
        count += ((u < low) | (u > high)).sum()
    return count


def grid_gradients(g: Tensor, latent: Tensor, grid: Grid, clip_mask: bool) -> tuple[Tensor, Tensor, Tensor]:
    """``dW (rows, in)``, ``ds`` and ``dz (rows, groups)`` from ``G (rows, in)``; formulas in the module's docstring.

    Args:
        g: ``G = dL/dW_hat``.
        latent: ``W``, ``(rows, in)``.
        grid: of these rows, `widened` to the dtype of `g`.
        clip_mask: stop gradients of weights beyond the ends of the grid.
    """
    scheme, s = grid.scheme, grid.scale.unsqueeze(-1)
    s0 = s if grid.code_scale is None else grid.code_scale.unsqueeze(-1)
    z = torch.zeros_like(s) if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
    g, v = grouped(g, scheme), grouped(latent, scheme) / s0
    u = v.round() + z
    q = u.clamp(scheme.qmin, scheme.qmax)
    step, dw, dz = q - z, g, torch.zeros_like(s[..., 0])
    if clip_mask:
        inside = u == q
        dz, dw, v = -(s * g * ~inside).sum(-1), g * inside, v * inside
    ds = (g * (step - v if s0 is s else step)).sum(-1)
    return (dw if s0 is s else dw * (s / s0)).flatten(-2), ds, dz
