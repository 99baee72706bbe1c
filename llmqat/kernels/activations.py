"""Inputs of layers, keys and values on their int8 grids: by Triton's kernels on a GPU, elsewhere by torch.

Both find the bits of `llmqat.quant.affine`. Gradients pass straight through.
"""

from typing import Any

import torch
from torch import Tensor

from llmqat.kernels.gpu import available
from llmqat.quant import affine


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """`llmqat.quant.affine.quantize_activation`, by the kernels where they run."""
    gpu = _on_gpu(x)
    found: tuple[Tensor, Tensor] = affine.quantize_activation(x) if gpu is None else gpu.quantize_activation(x)
    return found


def fake_quantize_activation(x: Tensor) -> Tensor:
    """`llmqat.quant.affine.fake_quantize_activation`, by the kernels where they run."""
    gpu = _on_gpu(x)
    x_hat: Tensor = affine.fake_quantize_activation(x) if gpu is None else gpu.fake_quantize_activation(x)
    return x_hat


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """`llmqat.quant.affine.fake_quantize_static`, by the kernels where they run."""
    gpu = _on_gpu(x, scale)
    x_hat: Tensor = affine.fake_quantize_static(x, scale) if gpu is None else gpu.fake_quantize_static(x, scale)
    return x_hat


def _on_gpu(*tensors: Tensor) -> Any:
    """The module of Triton's kernels, if they take these tensors of floats; else None."""
    if not available.reads(*tensors):
        return None
    from llmqat.kernels.gpu import activations as gpu

    return gpu


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
