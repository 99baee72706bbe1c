"""Losses of tokens and errors of hidden states, each with its gradient, in one call and without float32 copies.

By the compiled kernels on a CPU, by Triton's on a GPU.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import training
from llmqat.kernels.gpu import available
from llmqat.kernels.native import DTYPES, check_memory
from llmqat.kernels.training import pointer


class TokenLosses(ctypes.Structure):
    """`llmqat_token_losses` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "teacher", "ids", "losses", "gradient")),
        *((name, ctypes.c_int64) for name in ("tokens", "vocabulary")),
        *((name, ctypes.c_int32) for name in ("dtype", "teacher_dtype")),
        ("factor", ctypes.c_float),
    )


class StateErrors(ctypes.Structure):
    """`llmqat_state_errors` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("states", "targets", "factors", "errors", "gradient")),
        *((name, ctypes.c_int64) for name in ("tokens", "width")),
        *((name, ctypes.c_int32) for name in ("dtype", "target_dtype")),
    )


def supports(*tensors: Tensor) -> bool:
    """Whether there are kernels that take these tensors of floats, which may not be empty."""
    return available.reads(*tensors) or (all(tensor.numel() for tensor in tensors) and training.readable(*tensors))


def on_gpu(*tensors: Tensor) -> Any:
    """The module of Triton's kernels, if they take these tensors of floats; else None."""
    if not available.reads(*tensors):
        return None
    from llmqat.kernels.gpu import losses as gpu

    return gpu


def token_losses(logits: Tensor, targets: Tensor, factor: float, gradient: Tensor | None) -> Tensor:
    """Loss of each token ``(tokens,)`` in nats, float32; `supports` has said yes.

    Args:
        logits: ``(tokens, V)``.
        targets: teacher logits ``(tokens, V)``, for ``KL(p_teacher || p)``; or token ids ``(tokens,)``, for
            cross-entropy.
        factor: of the gradient.
        gradient: of each token's loss in its logits, times `factor`, is written here; may be the logits themselves.

    Raises:
        LlmqatError: if the tensors do not fit each other, or an id is not in the vocabulary. On a GPU, where the host
            would have to wait for it, such an id makes loss and gradient of its token NaN instead.
    """
    logits = logits.contiguous()
    with_teacher = targets.ndim == 2
    targets = targets.contiguous() if with_teacher else targets.to(torch.int64).contiguous()
    check_memory("targets", targets, tuple(logits.shape[: targets.ndim]), targets.dtype, logits.device)
    if gradient is not None:
        check_memory("gradient", gradient, tuple(logits.shape), logits.dtype, logits.device)
    gpu = on_gpu(logits)
    if gpu is not None:
        found: Tensor = gpu.token_losses(logits, targets, factor, gradient)
        return found
    losses = torch.empty(len(logits))
    call = TokenLosses(
        logits.data_ptr(),
        pointer(targets if with_teacher else None),
        pointer(None if with_teacher else targets),
        losses.data_ptr(),
        pointer(gradient),
        *logits.shape,
        DTYPES[logits.dtype],
        DTYPES[targets.dtype] if with_teacher else 0,
        factor,
    )
    training.call("llmqat_find_losses", ctypes.byref(call))
    return losses


def state_errors(states: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Relative squared error of each state, float32, and its gradient in the dtype of the states; `supports` said yes.

    Args:
        states: ``(..., width)``.
        targets: of the same shape.
        factors: of the gradients, ``(...)``.

    Raises:
        LlmqatError: if the shapes differ.
    """
    states, targets, factors = states.contiguous(), targets.contiguous(), factors.float().contiguous()
    check_memory("targets", targets, tuple(states.shape), targets.dtype, states.device)
    check_memory("factors", factors, tuple(states.shape[:-1]), torch.float32, states.device)
    gpu = on_gpu(states)
    if gpu is not None:
        found: tuple[Tensor, Tensor] = gpu.state_errors(states, targets, factors)
        return found
    errors, gradient = torch.empty(states.shape[:-1]), torch.empty_like(states)
    call = StateErrors(
        *(tensor.data_ptr() for tensor in (states, targets, factors, errors, gradient)),
        errors.numel(),
        states.shape[-1],
        DTYPES[states.dtype],
        DTYPES[targets.dtype],
    )
    training.call("llmqat_find_state_errors", ctypes.byref(call))
    return errors, gradient
