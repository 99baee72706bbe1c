"""The autograd function of a fake-quantized linear layer: products by ``W_hat``, and the gradients of what makes it.

The formulas are those of `llmqat.quant.fake_quant`. Nothing the size of the weight is kept for the backward: codes and
``W_hat`` are found again, a few rows at a time.

Where processes divide the rows of the weight (see `RowShard`), each quantizes its own, and gathers ``W_hat``; ``G`` is
the mean over processes, of which each takes its rows.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.kernels.activations import fake_quantize_activation
from llmqat.kernels.grid_rows import fake_quantize, grid_gradients
from llmqat.kernels.products import multiply
from llmqat.quant.fake_quant import compute_dtype
from llmqat.quant.grid import Adapters, Compensation, Grid, Latent
from llmqat.quant.input_cast import InputCast
from llmqat.quant.row_shards import RowShard, narrower
from llmqat.scheme import QuantScheme

_input_cast = InputCast()


class PerArgument(NamedTuple):
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
    """``y = x_hat @ W_hat.T + bias``. `cast` is `x` in the dtype of the product."""

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
        ctx.dtypes = (x.dtype, None if bias is None else bias.dtype)
        return output_of(cast, bias, *values_of(tensors, ctx.constants))

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> PerArgument:
        x, *tensors = ctx.saved_tensors  # read once: torch.utils.checkpoint allows no second look
        need = PerArgument(*ctx.needs_input_grad)
        return gradients_of(grad_y, x, *values_of(tensors, ctx.constants), need, ctx.clip_mask, ctx.dtypes)


def output_of(x: Tensor, bias: Tensor | None, latent: Latent, grid: Grid) -> Tensor:
    """``x_hat @ W_hat.T + bias`` in the dtype of `x`, no gradient."""
    w_hat = whole_w_hat(latent, grid, x.dtype)
    x_hat = fake_quantize_activation(x) if grid.scheme.inputs == "dynamic" else x
    return multiply(x_hat, w_hat.T, None if bias is None else bias.to(x.dtype))


def gradients_of(
    grad_y: Tensor,
    x: Tensor,
    latent: Latent,
    grid: Grid,
    need: PerArgument,
    clip_mask: bool,
    dtypes: tuple[torch.dtype, torch.dtype | None],
) -> PerArgument:
    """Gradients of what is needed from that of the output.

    Args:
        grad_y: ``(..., out)``.
        x: the input ``(..., in)`` in the dtype of the product.
        latent: the weight.
        grid: its grid.
        need: which gradients are needed.
        clip_mask: see `fake_quant_linear`.
        dtypes: of the gradients of input and bias.
    """
    gy, x2 = grad_y.reshape(-1, grad_y.shape[-1]), x.reshape(-1, x.shape[-1])
    if grid.scheme.inputs == "dynamic":
        x2 = fake_quantize_activation(x2)
    made, w_hat = _gradients(gy, x2, latent, grid, need, clip_mask)
    if need.bias:
        made = made._replace(bias=gy.sum(0, dtype=dtypes[1]))
    if need.x:
        w_hat = whole_w_hat(latent, grid, x.dtype) if w_hat is None else w_hat
        made = made._replace(x=multiply(gy, w_hat, dtype=dtypes[0]).view(x.shape))
    return made


def values_of(tensors: Any, constants: tuple[float, QuantScheme, torch.dtype, RowShard | None]) -> tuple[Latent, Grid]:
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


def _gradients(
    gy: Tensor, x: Tensor, latent: Latent, grid: Grid, need: PerArgument, clip_mask: bool
) -> tuple[PerArgument, Tensor | None]:
    """Gradients of what makes the weight, as far as they are needed, from those of the outputs ``(tokens, out)`` and
    the inputs ``(tokens, in)``; and ``W_hat`` in the dtype of `x`, where it was found on the way."""
    made, w_hat, adapted = PerArgument(), None, need.lora_a or need.lora_b
    # Without mask and with s0 = s the latent's gradient is G itself, a product of two matrices: where nothing else
    # needs it, adapters take theirs from its thin side, and G is never formed.
    direct = not clip_mask and grid.code_scale is None
    if not (need.weight or need.scale or need.zero_point):
        if not adapted:
            return made, None
        if direct:
            da, db = _low_rank_gradients(gy, x, latent.adapters)
            return made._replace(lora_a=da, lora_b=db), None
    dw = multiply(gy.T, x, dtype=torch.promote_types(latent.weight.dtype, torch.float32))
    if latent.shard is not None:
        dw = latent.shard.mean_of(dw)
    if need.scale or need.zero_point or not direct:
        out_dtype = x.dtype if need.x and latent.shard is None else None
        of_scale, of_zero, w_hat = grid_gradients(
            dw, latent, grid, clip_mask=clip_mask, zero_point=need.zero_point, out_dtype=out_dtype
        )
        made = made._replace(scale=of_scale if need.scale else None, zero_point=of_zero if need.zero_point else None)
    if need.weight:
        made = made._replace(weight=dw.to(latent.weight.dtype))
    if adapted:
        da, db = _adapter_gradients(dw, latent)
        made = made._replace(lora_a=da, lora_b=db)
    return made, w_hat


def _low_rank_gradients(gy: Tensor, x: Tensor, adapters: Adapters | None) -> tuple[Tensor, Tensor]:
    """``dA = c B^T (gy^T x)`` and ``dB = c (gy^T x) A^T``, multiplied from the thin side."""
    assert adapters is not None
    a, b, scaling = adapters
    da = multiply(multiply(gy, b.to(gy.dtype)).T, x, dtype=a.dtype)
    db = multiply(gy.T, multiply(x, a.to(x.dtype).T), dtype=b.dtype)
    return da.mul_(scaling), db.mul_(scaling)


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
    tensors = (bias, weight, *change, *factors[:2], *grid[:3])
    constants = (factors[2], grid.scheme, grid.storage_dtype, shard)
    if torch.compiler.is_compiling() and shard is None:
        from llmqat.nn.fake_quant_operator import fake_quant_linear as opaque

        return opaque(x, *tensors, *constants[:3], dtype, clip_mask)
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = _eager(x, dtype, bias, weight, *change, *factors, *grid, shard, clip_mask)
    return y


@torch.compiler.disable
def _eager(x: Tensor, dtype: torch.dtype, *args: Any) -> Any:
    """Run eagerly, inside `torch.compile` too, which does not know what processes send each other here."""
    return _FakeQuantLinear.apply(x, _input_cast(x, dtype), *args)
