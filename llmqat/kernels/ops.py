"""The operator `llmqat::packed_linear`: schema, shape function and the pure-torch reference.

On a CPU the compiled kernels of `native` run under this same operator; nothing above this layer knows which one runs.
"""

from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.quant.affine import dequantize, fake_quantize_activation
from llmqat.quant.packing import from_unsigned, packed_width, unpack_rows
from llmqat.scheme import QuantScheme

# The reference dequantizes this many weights at a time: no dense copy of the layer is ever held.
CHUNK_ELEMENTS = 1 << 22
NAME = "llmqat::packed_linear"


def unpack_weight(
    weight_packed: Tensor, weight_scale: Tensor, weight_zero_point: Tensor | None, scheme: QuantScheme, in_features: int
) -> tuple[Tensor, Tensor | None]:
    """Codes ``(out, in)`` and integer zero points ``(out, groups)`` of a packed layer (layout in `packed_linear`)."""
    codes = from_unsigned(unpack_rows(weight_packed, scheme.bits, in_features), scheme)
    if weight_zero_point is None:
        return codes, None
    out_features = weight_packed.shape[0]
    return codes, unpack_rows(weight_zero_point.T.contiguous(), scheme.bits, out_features).T.contiguous()


def _scheme(
    weight_scale: Tensor, weight_zero_point: Tensor | None, bits: int, in_features: int, act_bits: int | None
) -> QuantScheme:
    return QuantScheme(bits, in_features // weight_scale.shape[1], weight_zero_point is None, act_bits)


def packed_linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    act_bits: int | None,
) -> Tensor:
    """``x @ W_hat.T + bias`` with ``W_hat = scale * (codes - zero_point)`` read from packed codes. Inference only.

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; also the dtype of the result.
        weight_packed: int32 ``(out, ceil(in * bits / 32))``, bit order of `llmqat.quant.packing`.
        weight_scale: ``(out, groups)`` in its storage dtype, in which ``W_hat`` is rounded.
        weight_zero_point: int32 ``(ceil(out * bits / 32), groups)``, packed along `out`; None if symmetric.
        bias: ``(out,)`` or None.
        bits: width of a code.
        in_features: weights per row.
        act_bits: 8 quantizes `x` per token first, exactly as in training; None leaves it alone.
    """
    y: Tensor = _operator(x, weight_packed, weight_scale, weight_zero_point, bias, bits, in_features, act_bits)
    return _InferenceOnly.apply(y, x) if torch.is_grad_enabled() and x.requires_grad else y  # type: ignore[no-any-return]


def _run(x: Tensor, *layer: Any) -> Tensor:
    _check(x, *layer)
    _, weight_scale, _, _, _, in_features, _ = layer
    run = native.linear if native.supports(x, weight_scale, in_features) else reference
    return run(x, *layer)


def reference(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    act_bits: int | None,
) -> Tensor:
    """`packed_linear` in plain torch, on any device and in any dtype; it defines what the kernels compute."""
    scheme = _scheme(weight_scale, weight_zero_point, bits, in_features, act_bits)
    out_features = weight_packed.shape[0]
    x_hat = x if act_bits is None else fake_quantize_activation(x)
    x_hat = x_hat.reshape(-1, in_features)
    y = torch.empty(x_hat.shape[0], out_features, dtype=x.dtype, device=x.device)
    z = None
    if weight_zero_point is not None:
        z = unpack_rows(weight_zero_point.T.contiguous(), bits, out_features).T
    step = max(1, CHUNK_ELEMENTS // in_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        codes = from_unsigned(unpack_rows(weight_packed[rows], bits, in_features), scheme)
        w_hat = dequantize(codes, weight_scale[rows], None if z is None else z[rows], scheme)
        y[:, rows] = torch.nn.functional.linear(
            x_hat, w_hat.to(x.dtype), None if bias is None else bias[rows].to(x.dtype)
        )
    return y.view(*x.shape[:-1], out_features)


def _check(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    _: Tensor | None,
    bits: int,
    in_features: int,
    *__: int | None,
) -> None:
    """Shapes and dtypes, once, before any pointer is read."""
    out_features, words = weight_packed.shape
    groups, width = weight_scale.shape[1], packed_width(in_features, bits)
    zeros = (packed_width(out_features, bits), groups)
    if weight_packed.dtype != torch.int32:
        raise RuntimeError(f"weight_packed must be int32 words, got {weight_packed.dtype}")
    if x.shape[-1] != in_features:
        raise RuntimeError(f"x has {x.shape[-1]} features, the packed weight {in_features}")
    if words != width:
        raise RuntimeError(f"{in_features} codes of {bits} bits take {width} words a row, got {words}")
    if weight_scale.shape[0] != out_features or in_features % groups:
        raise RuntimeError(
            f"weight_scale {tuple(weight_scale.shape)} does not fit a weight of ({out_features}, {in_features})"
        )
    if weight_zero_point is not None and weight_zero_point.shape != zeros:
        raise RuntimeError(f"weight_zero_point must be packed along the rows: {zeros}")


def _shape(x: Tensor, weight_packed: Tensor, *layer: Any) -> Tensor:
    _check(x, weight_packed, *layer)
    return x.new_empty(*x.shape[:-1], weight_packed.shape[0])


class _InferenceOnly(torch.autograd.Function):
    """Lets `y` through; a backward pass, which would find no gradient for `x`, fails."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> None:
        raise LlmqatError("packed layers have no gradient: train the prepared model, before convert and pack")


# Not `custom_op`: its checks of what is aliased and its autograd layer cost as much as a small product.
torch.library.define(NAME, torch.library.infer_schema(packed_linear, mutates_args=()))
torch.library.impl(NAME, "CompositeExplicitAutograd", _run)
torch.library.register_fake(NAME, _shape)
_operator = torch.ops.llmqat.packed_linear.default
