"""Inputs of layers in the dtype of autocast, cast once for all layers that read one tensor."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.compat.torch import writes_to


class _Kept(NamedTuple):
    """A cast: what it is of, and how often that had been written to."""

    of: weakref.ref[Tensor]
    version: int
    cast: Tensor


class InputCast:
    """Keeps the last cast until its input goes or another tensor is cast: q, k and v get one, so do gate and up."""

    def __init__(self) -> None:
        self.kept: _Kept | None = None

    def __call__(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """`x` in `dtype`, without gradient; the tensor that the call before returned if that was of the same `x`."""
        if x.dtype == dtype or x.is_inference():  # which does not count how often it was written to
            return x.detach().to(dtype)
        kept, version = self.kept, writes_to(x)
        if kept is not None and kept.of() is x and (kept.version, kept.cast.dtype) == (version, dtype):
            return kept.cast
        self.kept = _Kept(weakref.ref(x, self._forget), version, x.detach().to(dtype))
        return self.kept.cast

    def _forget(self, of: weakref.ref[Tensor]) -> None:
        if self.kept is not None and self.kept.of is of:
            self.kept = None
