"""The fake-quantized linear layer: integer grid in the forward, straight-through gradients in the backward.

With a latent weight ``W`` (see `latent_rows`), a stored scale ``s``, an integer zero point ``z`` and the code scale
``s0`` (``s0 = s`` unless it was set apart):

    v = W / s0          u = round(v) + z          q = clamp(u, qmin, qmax)          W_hat = s * (q - z)

`round` (of v, of z, and of s to its storage dtype) passes gradients straight through. ``m`` is the derivative taken for
the clamp: 1 everywhere, or with `clip_mask` 1 inside the range and 0 outside. For ``G = dL/dW_hat``:

    dW = m * G * s / s0
    ds = sum over the group of  G * (q - z - m * v)    where s0 = s: the learned step of LSQ (arXiv 1902.08153, eq. 3)
         sum over the group of  G * (q - z)            where s0 is apart: codes do not move with the scale
                                                       (EfficientQAT's E2E-QP, arXiv 2407.11062, section 3.3)
    dz = sum over the group of  -s * G * (1 - m)

Nothing the size of the weight is kept for the backward: codes and ``W_hat`` are found again, a few rows at a time.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmqat.quant.affine import code_values, dequantize, fake_quantize_activation, fake_quantize_static, grouped
from llmqat.scheme import QuantScheme

# Rows are processed so that a float32 temporary of them (1 MiB) stays in the L2 cache between passes.
CHUNK_ELEMENTS = 1 << 18


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over `rows` of about `CHUNK_ELEMENTS` elements each."""
    step = max(1, CHUNK_ELEMENTS // columns)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def latent_rows(
    rows: slice,
    weight: Tensor,
    compensation: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    lora_scaling: float,
) -> Tensor:
    """Rows of the latent weight ``weight + lora_scaling * lora_b @ lora_a + compensation``, float32 or wider.

    Args:
        rows: which of the ``out`` rows.
        weight: ``(out, in)``.
        compensation: ``(out, in)``, what GPTQ added to the weight; any float dtype.
        lora_a: ``(r, in)``.
        lora_b: ``(out, r)``.
        lora_scaling: ``alpha / r``.
    """
    latent = weight[rows].to(torch.promote_types(weight.dtype, torch.float32))
    if lora_a is not None and lora_b is not None:
        with torch.autocast(latent.device.type, enabled=False):
            latent = torch.addmm(latent, lora_b[rows].to(latent.dtype), lora_a.to(latent.dtype), alpha=lora_scaling)
    if compensation is not None:  # last: merged adapters then give the same bits
        latent = latent + compensation[rows]
    return latent


def _rows_of(rows: slice, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[rows]


def fake_quantize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    code_scale: Tensor | None = None,
    compensation: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``dequantize(quantize(latent))``, ``(out, in)``, in `out_dtype` (by default `scale_dtype`); no gradient."""
    out = torch.empty(weight.shape, dtype=out_dtype or scale_dtype, device=weight.device)
    s = scale.to(scale_dtype)
    s0 = s if code_scale is None else code_scale
    z = None if zero_point is None else rounded_zero_point(zero_point, scheme)
    for rows in row_chunks(*weight.shape):
        latent, zr = latent_rows(rows, weight, compensation, lora_a, lora_b, lora_scaling), _rows_of(rows, z)
        out[rows] = dequantize(code_values(latent, s0[rows], zr, scheme), s[rows], zr, scheme)
    return out


def rounded_zero_point(zero_point: Tensor, scheme: QuantScheme) -> Tensor:
    """The integer zero point inside the code range."""
    return zero_point.round().clamp(scheme.qmin, scheme.qmax)


class _FakeQuantActivation(torch.autograd.Function):
    """``x_hat``; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return fake_quantize_activation(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def fake_quant_activation(x: Tensor) -> Tensor:
    """`x` on the int8 grid of its last dimension (see `quantize_activation`), with a straight-through gradient."""
    x_hat: Tensor = _FakeQuantActivation.apply(x)
    return x_hat


class _StaticActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return fake_quantize_static(x, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, scale = ctx.saved_tensors
        u = (x / scale.to(x.dtype)).round()
        return grad * ((u >= -128) & (u <= 127)), None


class _FakeQuantLinear(torch.autograd.Function):
    """``y = x_hat @ W_hat.T + bias``; formulas in the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        bias: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        code_scale: Tensor | None,
        compensation: Tensor | None,
        scheme: QuantScheme,
        scale_dtype: torch.dtype,
        lora_scaling: float,
        clip_mask: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale, zero_point, lora_a, lora_b, code_scale, compensation)
        ctx.options = (scheme, scale_dtype, lora_scaling)
        ctx.clip_mask = clip_mask
        ctx.bias_dtype = None if bias is None else bias.dtype
        w_hat = fake_quantize(
            weight,
            scale,
            zero_point,
            scheme,
            scale_dtype,
            code_scale,
            compensation,
            lora_a,
            lora_b,
            lora_scaling,
            x.dtype,
        )
        x_hat = x if scheme.act_bits is None else fake_quantize_activation(x)
        return linear(x_hat, w_hat, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no second look
        x, weight, scale, zero_point, lora_a, lora_b, code_scale, compensation = saved
        scheme, scale_dtype, lora_scaling = ctx.options
        need_x, need_w, need_s, need_z, need_bias, need_a, need_b, *_ = ctx.needs_input_grad
        gy, x2 = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        if scheme.act_bits is not None:
            x2 = fake_quantize_activation(x2)
        dx = da = db = None
        if need_x:
            lora = (code_scale, compensation, lora_a, lora_b, lora_scaling)
            dx = grad_y @ fake_quantize(weight, scale, zero_point, scheme, scale_dtype, *lora, x.dtype)
        dbias = gy.sum(0, dtype=ctx.bias_dtype) if need_bias else None
        # Without mask and with s0 = s the latent's gradient is G itself, a product of two thin matrices: adapters take
        # theirs from the factors, and G is never formed.
        if (need_a or need_b) and not (need_w or need_s or need_z or ctx.clip_mask or code_scale is not None):
            da, db = _low_rank_gradients(gy, x2, lora_a, lora_b, lora_scaling)
            return dx, None, None, None, dbias, da, db, *[None] * 6
        dw = ds = dz = None
        if need_w or need_s or need_z or need_a or need_b:
            dw, ds, dz = _weight_gradients(ctx, saved, gy, x2)
        if need_a and dw is not None:
            da = lora_scaling * (lora_b.to(dw.dtype).T @ dw).to(lora_a.dtype)
        if need_b and dw is not None:
            db = lora_scaling * (dw @ lora_a.to(dw.dtype).T).to(lora_b.dtype)
        return dx, dw if need_w else None, ds, dz, dbias, da, db, *[None] * 6


def _low_rank_gradients(gy: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """``dA = c B^T (gy^T x)`` and ``dB = c (gy^T x) A^T``, multiplied from the thin side."""
    da = (gy @ b.to(gy.dtype)).T @ x
    db = gy.T @ (x @ a.to(x.dtype).T)
    return scaling * da.to(a.dtype), scaling * db.to(b.dtype)


def _weight_gradients(
    ctx: Any, saved: tuple[Any, ...], gy: Tensor, x: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of latent weight, scale and zero point, from ``gy (tokens, out)`` and ``x (tokens, in)``."""
    _, weight, scale, zero_point, lora_a, lora_b, code_scale, compensation = saved
    scheme, scale_dtype, lora_scaling = ctx.options
    _, _, need_s, need_z, *_ = ctx.needs_input_grad
    dw = (gy.T @ x).to(torch.promote_types(weight.dtype, torch.float32))
    decoupled = code_scale is not None
    if not (need_s or need_z or ctx.clip_mask or decoupled):
        return dw.to(weight.dtype), None, None
    ds = torch.empty_like(scale) if need_s else None
    dz = torch.empty_like(zero_point) if need_z else None
    stored = scale.to(scale_dtype).to(dw.dtype).unsqueeze(-1)
    code_scale = code_scale.to(dw.dtype).unsqueeze(-1) if decoupled else None
    z = torch.zeros_like(stored) if zero_point is None else rounded_zero_point(zero_point, scheme).unsqueeze(-1)
    for rows in row_chunks(*weight.shape):
        latent = latent_rows(rows, weight, compensation, lora_a, lora_b, lora_scaling)
        grid = (stored[rows], _rows_of(rows, code_scale), z[rows])
        dw[rows], ds_rows, dz_rows = grid_gradients(dw[rows], latent, *grid, scheme, ctx.clip_mask)
        if ds is not None:
            ds[rows] = ds_rows
        if dz is not None:
            dz[rows] = dz_rows
    return dw.to(weight.dtype), ds, dz


def grid_gradients(
    g: Tensor, latent: Tensor, s: Tensor, s0: Tensor | None, z: Tensor, scheme: QuantScheme, clip_mask: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``dW (rows, in)``, ``ds`` and ``dz (rows, groups)`` from ``G (rows, in)``; formulas in the module's docstring.

    Args:
        g: ``G = dL/dW_hat``.
        latent: ``W``, ``(rows, in)``.
        s: stored scale ``(rows, groups, 1)``.
        s0: code scale, likewise; None where it is `s`.
        z: integer zero point ``(rows, groups, 1)``; zeros if symmetric.
        scheme: the grid.
        clip_mask: stop gradients of weights beyond the ends of the grid.
    """
    g, v = grouped(g, scheme), grouped(latent, scheme) / (s if s0 is None else s0)
    u = v.round() + z
    q = u.clamp(scheme.qmin, scheme.qmax)
    step, dw, dz = q - z, g, torch.zeros_like(s[..., 0])
    if clip_mask:
        inside = u == q
        dz, dw, v = -(s * g * ~inside).sum(-1), g * inside, v * inside
    ds = (g * (step - v if s0 is None else step)).sum(-1)
    return (dw if s0 is None else dw * (s / s0)).flatten(-2), ds, dz


def static_activation(x: Tensor, scale: Tensor) -> Tensor:
    """`fake_quantize_static`, differentiable in `x`: gradients pass straight through, and stop where the grid ends."""
    y: Tensor = _StaticActivation.apply(x, scale)
    return y


def fake_quant_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bias: Tensor | None,
    scheme: QuantScheme,
    scale_dtype: torch.dtype,
    *,
    code_scale: Tensor | None = None,
    compensation: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    lora_scaling: float = 1.0,
    clip_mask: bool = False,
) -> Tensor:
    """Linear layer on the integer grid, differentiable in `x`, weight, scale, zero point, bias and adapters.

    Computes in the autocast dtype where autocast is on, else in the dtype of `x`.

    Args:
        x: ``(..., in)``.
        weight: float32 master ``(out, in)``.
        scale: ``(out, groups)``; rounded to `scale_dtype` inside.
        zero_point: ``(out, groups)``, or None for a symmetric scheme.
        bias: ``(out,)`` or None.
        scheme: the grid.
        scale_dtype: dtype in which scales are stored, and ``W_hat`` is computed.
        code_scale: ``(out, groups)``: finds the codes in place of `scale`, so that training the scale moves no code.
        compensation: ``(out, in)`` added to the weight before it is quantized.
        lora_a: ``(r, in)`` adapter inside the quantizer.
        lora_b: ``(out, r)``.
        lora_scaling: ``alpha / r``.
        clip_mask: stop the gradient of weights beyond the ends of the grid. Off by default: a masked weight that left
            the range can not come back, and adapters would need the full weight gradient at every step.
    """
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        x = x.to(torch.get_autocast_dtype(device_type))
    with torch.autocast(device_type, enabled=False):
        y: Tensor = _eager(
            x,
            weight,
            scale,
            zero_point,
            bias,
            lora_a,
            lora_b,
            code_scale,
            compensation,
            scheme,
            scale_dtype,
            lora_scaling,
            clip_mask,
        )
    return y


@torch.compiler.disable
def _eager(*args: Any) -> Tensor:
    """Eager inside `torch.compile` too: Inductor fuses away the rounding of scale and ``W_hat`` to `scale_dtype`."""
    result: Tensor = _FakeQuantLinear.apply(*args)
    return result
