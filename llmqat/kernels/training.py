"""The compiled kernels of training on a CPU, through ctypes, and the switch that leaves training to torch.

They compute what torch does: codes, scales and ``W_hat`` bit for bit, products and gradients to the rounding of sums.
``LLMQAT_TRAINING=torch`` turns them off; so does ``LLMQAT_KERNELS=reference``.
"""

import ctypes
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from llmqat.errors import LlmqatError
from llmqat.kernels import native

SWITCH = "LLMQAT_TRAINING"


def is_off() -> bool:
    """Whether `LLMQAT_TRAINING` leaves training to torch.

    Raises:
        LlmqatError: if it says what is not known.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "torch"):
        raise LlmqatError(f"{SWITCH}={wanted} is not known; set it to torch, or leave it unset")
    return bool(wanted)


def library() -> ctypes.CDLL | None:
    """The compiled kernels, if training may use them."""
    return None if is_off() else native.library()


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library, with torch's number of threads."""
    kernels = library()
    assert kernels is not None
    native.use_threads(kernels)
    getattr(kernels, name)(*arguments)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where the values of a tensor lie; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def readable(*tensors: Tensor) -> bool:
    """Whether the library runs and can read these tensors: plain ones with values, on the CPU, of dtypes it knows."""
    return library() is not None and all(map(_is_plain, tensors))


def _is_plain(tensor: Tensor) -> bool:
    known = type(tensor) in (Tensor, Parameter) and tensor.dtype in native.DTYPES
    return known and tensor.device.type == "cpu" and tensor.layout == torch.strided


def dense(tensor: Tensor) -> Tensor:
    """`tensor`, or a copy of it unless its rows fill one run of memory, in whatever order."""
    *rows, step = tensor.stride()
    order = sorted(range(len(rows)), key=lambda dim: -rows[dim])
    return tensor if step == 1 and tensor.permute(*order, -1).is_contiguous() else tensor.contiguous()


def laid_out_like(tensor: Tensor, other: Tensor) -> Tensor:
    """`tensor`, or a copy of it unless its elements lie in the order of those of `other`."""
    if tensor.stride() == other.stride():
        return tensor
    return torch.empty_like(other, dtype=tensor.dtype).copy_(tensor)
