"""The compiled kernels of training on a CPU, through ctypes, and the switch that leaves training to torch.

They compute what torch does: codes, scales and ``W_hat`` bit for bit, products and gradients to the rounding of sums.
``LLMQAT_TRAINING=torch`` turns them off; so does ``LLMQAT_KERNELS=reference``.
"""

import ctypes
import os
from functools import cache
from typing import Any

from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.kernels import native

SWITCH = "LLMQAT_TRAINING"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, if training may use them.

    Raises:
        LlmqatError: if `LLMQAT_TRAINING` says what is not known.
    """
    wanted = os.environ.get(SWITCH, "")
    if wanted not in ("", "torch"):
        raise LlmqatError(f"{SWITCH}={wanted} is not known; set it to torch, or leave it unset")
    return None if wanted else native.library()


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library, with torch's number of threads."""
    kernels = library()
    assert kernels is not None
    native.use_threads(kernels)
    getattr(kernels, name)(*arguments)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Where the values of a tensor lie; null for none."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
