"""Kernels of training on a CPU: products in bfloat16 tiles, and weights on their grid. Where they do not run, torch does.

They compute what torch computes: codes, scales and ``W_hat`` bit for bit, products and gradients to the rounding of their
sums. `LLMQAT_TRAINING=torch` leaves all of it to torch; so does ``LLMQAT_KERNELS=reference``.
"""

import ctypes
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.quant.grid import Compensation, Grid

SWITCH = "LLMQAT_TRAINING"
# A product of fewer rows than this is no work for tiles.
LEAST_ROWS = 16


class Operand(ctypes.Structure):
    """`llmqat_operand` of csrc/core/training.h."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "row_stride", "column_stride")),
    )


class GridRows(ctypes.Structure):
    """`llmqat_grid` of csrc/core/training.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("latent", "multiples", "step", "scale", "code_scale", "zero_point")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "groups")),
        *((name, ctypes.c_int32) for name in ("latent_dtype", "scale_dtype", "qmin", "qmax")),
    )


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


@cache
def has_tiles() -> bool:
    """Whether products run in tiles here."""
    kernels = library()
    return kernels is not None and bool(kernels.llmqat_has_tiles())


def call(name: str, *arguments: Any) -> None:
    """Call a function of the library, with torch's number of threads."""
    kernels = library()
    assert kernels is not None
    native.use_threads(kernels)
    getattr(kernels, name)(*arguments)


def pointer(tensor: Tensor | None) -> int | None:
    """Where the values of a tensor lie."""
    return None if tensor is None else tensor.data_ptr()
