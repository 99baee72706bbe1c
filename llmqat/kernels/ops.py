"""The operator `llmqat::packed_linear`: schema, shape function and the pure-torch reference.

On a CPU the compiled kernels of `native` run under this same operator, on a GPU those of `gpu.linear`; nothing above
this layer knows which one runs.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.kernels.gpu.available import runs_inference_on
from llmqat.kernels.packed import Packed, check_input, check_packed
from llmqat.quant.affine import dequantize, fake_quantize_activation

# The reference dequantizes this many weights at a time: no dense copy of the layer is ever held.
CHUNK_ELEMENTS = 1 << 22
NAME = "llmqat::packed_linear"


def packed_linear(x: Tensor, packed: Packed) -> Tensor:
    """``x @ W_hat.T + bias`` with ``W_hat = scale * (codes - zero_point)`` read from packed codes. Inference only.

    Args:
        x: ``(..., in)``, float16, bfloat16, float32 or float64; also the dtype of the result.
        packed: the layer.

    Raises:
        LlmqatError: if the layer is no valid one, or `x` does not fit it.
    """
    y: Tensor = _operator(x, *packed)
    return _InferenceOnly.apply(y, x) if torch.is_grad_enabled() and x.requires_grad else y  # type: ignore[no-any-return]


def reference(x: Tensor, packed: Packed) -> Tensor:
    """`packed_linear` in plain torch, on any device and in any dtype; it defines what the kernels compute."""
    scale, bias, scheme, z = packed.scale, packed.bias, packed.scheme, packed.unpack_zero_point()
    out_features = packed.codes.shape[0]
    x_hat = x if packed.act_bits is None else fake_quantize_activation(x)
    x_hat = x_hat.reshape(-1, packed.in_features)
    y = torch.empty(x_hat.shape[0], out_features, dtype=x.dtype, device=x.device)
    step = max(1, CHUNK_ELEMENTS // packed.in_features)
    for start in range(0, out_features, step):
        rows = slice(start, min(start + step, out_features))
        w_hat = dequantize(packed.unpack(rows), scale[rows], None if z is None else z[rows], scheme)
        y[:, rows] = linear(x_hat, w_hat.to(x.dtype), None if bias is None else bias[rows].to(x.dtype))
    return y.view(*x.shape[:-1], out_features)


def _schema(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    act_bits: int | None,
) -> Tensor:
    """The arguments of the operator, for torch: `x` and the fields of `Packed`."""
    raise NotImplementedError


def _run(x: Tensor, *fields: Any) -> Tensor:
    packed = Packed(*fields)
    check_packed(packed)
    check_input(x, packed)
    if native.supports(x, packed.scale, packed.in_features):
        return native.linear(x, packed)
    gpu = gpu_kernels(x, packed)
    y: Tensor = reference(x, packed) if gpu is None else gpu.multiply(x, packed)
    return y


def gpu_kernels(x: Tensor, packed: Packed) -> Any:
    """The module `gpu.linear`, if its kernels run on the device of `x` and know all dtypes; else None."""
    if not runs_inference_on(x.device):
        return None
    from llmqat.kernels.gpu import linear as gpu

    return gpu if gpu.takes(x, packed) else None


def _run_fake(x: Tensor, *fields: Any) -> Tensor:
    packed = Packed(*fields)
    check_packed(packed)
    check_input(x, packed)
    return x.new_empty(*x.shape[:-1], packed.codes.shape[0])


class _InferenceOnly(torch.autograd.Function):
    """Lets `y` through; a backward pass, which would find no gradient for `x`, fails."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor) -> Tensor:
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> None:
        raise LlmqatError("packed layers have no gradient: train the prepared model, before convert and pack")


# Not `custom_op`: its checks of what is aliased and its autograd layer cost as much as a small product.
torch.library.define(NAME, torch.library.infer_schema(_schema, mutates_args=()))
torch.library.impl(NAME, "CompositeExplicitAutograd", _run)
torch.library.register_fake(NAME, _run_fake)
_operator = torch.ops.llmqat.packed_linear.default
