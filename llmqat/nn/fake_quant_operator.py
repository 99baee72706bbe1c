"""The operator `llmqat::fake_quant_linear`: a fake-quantized layer into which `torch.compile` does not look.

Inductor would fuse the rounding of scale and ``W_hat`` away, and train on codes that are never packed. As an operator
the layer needs no break of the graph either. It takes what `llmqat.nn.fake_quant_function` takes, laid out flat.
"""

from typing import Any

import torch
from torch import Tensor

from llmqat.nn.fake_quant_function import PerArgument, gradients_of, output_of, values_of
from llmqat.scheme import QuantScheme

NAME, BACKWARD = "llmqat::fake_quant_linear", "llmqat::fake_quant_linear_backward"
# Arguments in the order of the operator that can have a gradient; the others are None or no tensors of floats.
TENSORS = ("x", "bias", "weight", "multiples", "step", "lora_a", "lora_b", "scale", "zero_point", "code_scale")


def fake_quant_linear(x: Tensor, *arguments: Any) -> Tensor:
    """`llmqat.nn.fake_quant_function.fake_quant_linear` as one operator.

    Args:
        x: ``(..., in)``.
        *arguments: the other `TENSORS`; then scaling of the adapters, scheme, storage dtype, dtype of the product, and
            whether gradients stop beyond the ends of the grid.
    """
    *tensors, scaling, scheme, storage_dtype, dtype, clip_mask = arguments
    inputs = (scheme.bits, scheme.group_size, scheme.symmetric, scheme.act_bits, scheme.act_static, scheme.scale_dtype)
    y: Tensor = operator(x, *tensors, scaling, *inputs, storage_dtype, dtype, clip_mask)
    return y


def _schema(
    x: Tensor,
    bias: Tensor | None,
    weight: Tensor,
    multiples: Tensor | None,
    step: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    scale: Tensor,
    zero_point: Tensor | None,
    code_scale: Tensor | None,
    scaling: float,
    bits: int,
    group_size: int,
    symmetric: bool,
    act_bits: int | None,
    act_static: bool,
    scale_dtype: str | None,
    storage_dtype: torch.dtype,
    dtype: torch.dtype,
    clip_mask: bool,
) -> Tensor:
    """The arguments of the operator, for torch."""
    raise NotImplementedError


def _run(x: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    tensors, (scaling, scheme, storage_dtype, dtype, _) = rest[:8], _constants(rest[8:])
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        return output_of(x.to(dtype), bias, *values_of(tensors, (scaling, scheme, storage_dtype, None)))


def _run_backward(needed: list[bool], grad_y: Tensor, x: Tensor, bias: Tensor | None, *rest: Any) -> list[Tensor]:
    tensors, (scaling, scheme, storage_dtype, dtype, clip_mask) = rest[:8], _constants(rest[8:])
    need = PerArgument(**dict(zip(TENSORS, needed, strict=True)))
    dtypes = (x.dtype, None if bias is None else bias.dtype)
    values = values_of(tensors, (scaling, scheme, storage_dtype, None))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        made = gradients_of(grad_y.to(dtype), x.to(dtype), *values, need, clip_mask, dtypes)
    return [getattr(made, name).contiguous() for name, wanted in zip(TENSORS, needed, strict=True) if wanted]


def _constants(flat: tuple[Any, ...]) -> tuple[float, QuantScheme, torch.dtype, torch.dtype, bool]:
    scaling, *inputs, storage_dtype, dtype, clip_mask = flat
    return scaling, QuantScheme(*inputs), storage_dtype, dtype, clip_mask


def _fake(x: Tensor, bias: Tensor | None, weight: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0], dtype=rest[-2])


def _fake_backward(needed: list[bool], grad_y: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(tensor).contiguous() for tensor, wanted in zip(rest, needed, strict=False) if wanted]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: len(TENSORS)])
    ctx.constants = inputs[len(TENSORS) :]


def _backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    needed = [bool(need) for need in ctx.needs_input_grad[: len(TENSORS)]]
    made = iter(
        torch.ops.llmqat.fake_quant_linear_backward(needed, grad_y.contiguous(), *ctx.saved_tensors, *ctx.constants)
    )
    return *(next(made) if need else None for need in needed), *(None for _ in ctx.constants)


_OF_FORWARD = torch.library.infer_schema(_schema, mutates_args=())
torch.library.define(NAME, _OF_FORWARD)
torch.library.define(BACKWARD, f"(bool[] needed, Tensor grad_y, {_OF_FORWARD[1:].partition(' -> ')[0]} -> Tensor[]")
for name, run, fake in ((NAME, _run, _fake), (BACKWARD, _run_backward, _fake_backward)):
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    torch.library.register_fake(name, fake)
torch.library.register_autograd(NAME, _backward, setup_context=_keep)
operator = torch.ops.llmqat.fake_quant_linear.default
