"""Gates of training in compiled kernels: ``activation(gate) * up``, forward and backward in one pass each."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import training
from llmqat.kernels.native import DTYPES

# Activations by the number that the kernels give them.
ACTIVATIONS = ("silu", "gelu_tanh")


class Gate(ctypes.Structure):
    """`llmqat_gate` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gate", "up", "y", "g", "dgate", "dup")),
        *((name, ctypes.c_int64) for name in ("rows", "count", "stride")),
        *((name, ctypes.c_int32) for name in ("activation", "dtype")),
    )


def takes(gate: Tensor, up: Tensor) -> bool:
    """Whether the kernels run here and take these two."""
    return training.readable(gate, up) and gate.dtype == up.dtype and gate.shape == up.shape and gate.ndim > 0


def takes_halves(gate_up: Tensor) -> bool:
    """Whether the kernels run here and take gate and up in one tensor."""
    return training.readable(gate_up) and gate_up.ndim > 0 and gate_up.shape[-1] % 2 == 0


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gated(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of ``(..., count)`` each, differentiable in both; `takes` has said yes."""
    y: Tensor = _Gated.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    return y


@torch.compiler.disable  # type: ignore[untyped-decorator]
def gated_halves(gate_up: Tensor, activation: str) -> Tensor:
    """``activation(gate) * up`` of gate and up side by side, ``(..., 2 * count)``; `takes_halves` has said yes."""
    y: Tensor = _GatedHalves.apply(gate_up, activation)  # type: ignore[no-untyped-call]
    return y


def _struct(gate: Tensor, up: Tensor, stride: int, activation: str) -> Gate:
    """Rows of two tensors, which lie `stride` elements apart."""
    count, nothing = gate.shape[-1], (None,) * 4
    numbers = (gate.numel() // max(count, 1), count, stride, ACTIVATIONS.index(activation), DTYPES[gate.dtype])
    return Gate(gate.data_ptr(), up.data_ptr(), *nothing, *numbers)


def _forward(gate: Gate, y: Tensor) -> Tensor:
    gate.y = y.data_ptr()
    training.call("llmqat_gate_forward", ctypes.byref(gate))
    return y


def _backward(gate: Gate, g: Tensor, dgate: Tensor, dup: Tensor) -> None:
    g = g.contiguous()
    gate.g, gate.dgate, gate.dup = g.data_ptr(), dgate.data_ptr(), dup.data_ptr()
    training.call("llmqat_gate_backward", ctypes.byref(gate))


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return _forward(_struct(gate, up, gate.shape[-1], activation), torch.empty_like(gate))

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _backward(_struct(gate, up, gate.shape[-1], ctx.activation), g, dgate, dup)
        return dgate, dup, None


class _GatedHalves(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, activation: str) -> Tensor:
        gate_up = gate_up.contiguous()
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, -1)
        y = torch.empty(gate.shape, dtype=gate.dtype)
        return _forward(_struct(gate, up, gate_up.shape[-1], activation), y)

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        gradient = torch.empty_like(gate_up)
        (gate, up), (dgate, dup) = gate_up.chunk(2, -1), gradient.chunk(2, -1)
        _backward(_struct(gate, up, gate_up.shape[-1], ctx.activation), g, dgate, dup)
        return gradient, None
