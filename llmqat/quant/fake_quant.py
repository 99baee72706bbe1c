"""The fake-quantized linear layer: integer grid in the forward, straight-through gradients in the backward.

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

Nothing the size of the weight is kept for the backward: codes and ``W_hat`` are found again, a few rows at a time.

Where processes divide the rows of the weight (see `RowShard`), each quantizes its own, and gathers ``W_hat``; ``G`` is
the mean over processes, of which each takes its rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmqat.quant.affine import fake_quantize_activation, fake_quantize_static, grouped
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.quant.input_cast import InputCast
from llmqat.quant.row_shards import RowShard, narrower
from llmqat.scheme import QuantScheme

_input_cast = InputCast()


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
def codes_of(latent: Latent, grid: Grid) -> Tensor:
    """The codes of `fake_quantize`, ``(out, in)``: int8 for a symmetric scheme, else uint8."""
    weight, grid = latent.weight, grid.stored()
    dtype = torch.int8 if grid.scheme.symmetric else torch.uint8
    codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in latent.chunks():
        codes[rows] = grid.rows(rows).code_values(latent.rows(rows)).to(dtype)
    return codes


@torch.no_grad()
def count_clipped(latent: Latent, grid: Grid) -> Tensor:
    """How many latent weights lie more than half a code beyond the ends of the grid, a scalar on their device."""
    grid, (low, high) = grid.stored(), (grid.scheme.qmin - 0.5, grid.scheme.qmax + 0.5)
    s0 = grid.scale if grid.code_scale is None else grid.code_scale
    count = torch.zeros((), dtype=torch.int64, device=latent.weight.device)
    for rows in latent.chunks():
        u = grouped(latent.rows(rows), grid.scheme) / s0[rows, :, None]
        if grid.zero_point is not None:
            u = u + grid.zero_point[rows, :, None]
        count += ((u < low) | (u > high)).sum()
    return count


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


def static_activation(x: Tensor, scale: Tensor) -> Tensor:
    """`fake_quantize_static`, differentiable in `x`: gradients pass straight through, and stop where the grid ends."""
    y: Tensor = _StaticActivation.apply(x, scale)
    return y


class _PerArgument(NamedTuple):
    """One entry for each argument of `_FakeQuantLinear.forward`, in order: whether a gradient is needed, or the
    gradient."""

    x: Any = None
    cast: Any = None
    bias: Any = None
    weight: Any = None
    multiples: Any = None
    step: Any = None
    lora_a: Any = None
    lora_b: Any = None
    lora_scaling: Any = None
    scale: Any = None
    zero_point: Any = None
    code_scale: Any = None
    scheme: Any = None
    storage_dtype: Any = None
    shard: Any = None
    clip_mask: Any = None


class _FakeQuantLinear(torch.autograd.Function):
    """``y = x_hat @ W_hat.T + bias``; formulas in the module's docstring. `cast` is `x` in the dtype of the product."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cast: Tensor,
        bias: Tensor | None,
        weight: Tensor,
        multiples: Tensor | None,
        step: Tensor | None,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        lora_scaling: float,
        scale: Tensor,
        zero_point: Tensor | None,
        code_scale: Tensor | None,
        scheme: QuantScheme,
        storage_dtype: torch.dtype,
        shard: RowShard | None,
        clip_mask: bool,
    ) -> Tensor:
        tensors = (weight, multiples, step, lora_a, lora_b, scale, zero_point, code_scale)
        ctx.save_for_backward(cast, *tensors)
        ctx.constants = (lora_scaling, scheme, storage_dtype, shard)
        ctx.clip_mask = clip_mask
        ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype
        w_hat = whole_w_hat(*_values(tensors, ctx.constants), cast.dtype)
        x_hat = fake_quantize_activation(cast) if scheme.inputs == "dynamic" else cast
        return linear(x_hat, w_hat, None if bias is None else bias.to(cast.dtype))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> _PerArgument:
        x, *tensors = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no second look
        latent, grid = _values(tensors, ctx.constants)
        need = _PerArgument(*ctx.needs_input_grad)
        gy, x2 = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
        if grid.scheme.inputs == "dynamic":
            x2 = fake_quantize_activation(x2)
        own = _PerArgument(
            x=(grad_y @ whole_w_hat(latent, grid, x.dtype)).to(ctx.x_dtype) if need.x else None,
            bias=gy.sum(0, dtype=ctx.bias_dtype) if need.bias else None,
        )
        on_grid = need.scale or need.zero_point
        adapted = need.lora_a or need.lora_b
        # Without mask and with s0 = s the latent's gradient is G itself, a product of two thin matrices: adapters take
        # theirs from the factors, and G is never formed.
        if adapted and not (need.weight or on_grid or ctx.clip_mask or grid.code_scale is not None):
            da, db = _low_rank_gradients(gy, x2, latent.adapters)
            return own._replace(lora_a=da, lora_b=db)
        if not (need.weight or on_grid or adapted):
            return own
        dw, ds, dz = _weight_gradients(gy.T @ x2, latent, grid, need, ctx.clip_mask)
        own = own._replace(weight=dw.to(latent.weight.dtype) if need.weight else None, scale=ds, zero_point=dz)
        if adapted:
            da, db = _adapter_gradients(dw, latent)
            own = own._replace(lora_a=da, lora_b=db)
        return own


def _values(tensors: Any, constants: tuple[float, QuantScheme, torch.dtype, RowShard | None]) -> tuple[Latent, Grid]:
    """`Latent` and `Grid`, built again from the tensors and constants of `_FakeQuantLinear.forward`."""
    weight, multiples, step, a, b, scale, zero_point, code_scale = tensors
    scaling, scheme, storage_dtype, shard = constants
    adapters = None if a is None else Adapters(a, b, scaling)
    compensation = None if multiples is None else Compensation(multiples, step)
    grid = Grid(scale, zero_point, code_scale, scheme, storage_dtype)
    return Latent(weight, compensation, adapters, shard), grid


def whole_w_hat(latent: Latent, grid: Grid, dtype: torch.dtype) -> Tensor:
    """``W_hat`` of all rows in `dtype`: those of other processes are gathered, in the storage dtype if that is
    narrower."""
    if latent.shard is None:
        return fake_quantize(latent, grid, dtype)
    own = fake_quantize(latent, grid, narrower(dtype, grid.storage_dtype))
    return latent.shard.gathered(own).to(dtype)


def _low_rank_gradients(gy: Tensor, x: Tensor, adapters: Adapters | None) -> tuple[Tensor, Tensor]:
    """``dA = c B^T (gy^T x)`` and ``dB = c (gy^T x) A^T``, multiplied from the thin side."""
    assert adapters is not None
    a, b, scaling = adapters
    da = (gy @ b.to(gy.dtype)).T @ x
    db = gy.T @ (x @ a.to(x.dtype).T)
    return scaling * da.to(a.dtype), scaling * db.to(b.dtype)


def _adapter_gradients(dw: Tensor, latent: Latent) -> tuple[Tensor, Tensor]:
    """``dA = c B^T dW`` and ``dB = c dW A^T``.

    Of a shard, ``dW`` is the mean over processes already, and of its rows alone: so that the mean that is taken of the
    adapters' gradients is their sum over shards, each counts as often as there are processes.
    """
    assert latent.adapters is not None
    a, b, scaling = latent.adapters
    shard = latent.shard
    rows = slice(None) if shard is None else shard.rows
    scaling = scaling if shard is None else scaling * shard.count
    db = torch.zeros_like(b)
    db[rows] = scaling * (dw @ a.to(dw.dtype).T).to(b.dtype)
    return scaling * (b[rows].to(dw.dtype).T @ dw).to(a.dtype), db


def _weight_gradients(
    g: Tensor, latent: Latent, grid: Grid, need: _PerArgument, clip_mask: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of latent weight, in float32 or wider, scale and zero point, from ``G (out, in)`` of all rows; those of
    the grid that are not needed are None."""
    dw = g.to(torch.promote_types(latent.weight.dtype, torch.float32))
    dw = dw if latent.shard is None else latent.shard.mean_of(dw)
    if not (need.scale or need.zero_point or clip_mask or grid.code_scale is not None):
        return dw, None, None
    ds = torch.empty_like(grid.scale) if need.scale else None
    dz = torch.empty_like(grid.zero_point) if need.zero_point and grid.zero_point is not None else None
    grid = grid.widened(dw.dtype)
    for rows in latent.chunks():
        dw[rows], ds_rows, dz_rows = grid_gradients(dw[rows], latent.rows(rows), grid.rows(rows), clip_mask)
        if ds is not None:
            ds[rows] = ds_rows
        if dz is not None:
            dz[rows] = dz_rows
    return dw, ds, dz


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


def fake_quant_linear(
    x: Tensor, latent: Latent, grid: Grid, bias: Tensor | None = None, *, clip_mask: bool = False
) -> Tensor:
    """Linear layer on the integer grid, differentiable in `x`, weight, adapters, scale, zero point and bias.

    Computes in the autocast dtype where autocast is on, else in the dtype of `x`.

    Args:
        x: ``(..., in)``.
        latent: the weight that is quantized.
        grid: scales and zero points; the scale is rounded to its storage dtype inside. Where its scheme says so, tokens
            of `x` are quantized too; static inputs were before.
        bias: ``(out,)`` or None.
        clip_mask: stop the gradient of weights beyond the ends of the grid. Off by default: a masked weight that left
            the range can not come back, and adapters would need the full weight gradient at every step.
    """
    dtype = compute_dtype(x)
    weight, compensation, adapters, shard = latent
    factors = (None, None, 1.0) if adapters is None else adapters
    change = (None, None) if compensation is None else compensation
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _eager(x, dtype, bias, weight, *change, *factors, *grid, shard, clip_mask)
    return y


@torch.compiler.disable
def _eager(x: Tensor, dtype: torch.dtype, *args: Any) -> Any:
    """Run eagerly, inside `torch.compile` too: Inductor fuses the rounding of scale and ``W_hat`` away."""
    return _FakeQuantLinear.apply(x, _input_cast(x, dtype), *args)
