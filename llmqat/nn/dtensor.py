"""Parameters that are split over processes (FSDP2): `DTensor`, of which each process holds some rows."""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def whole(value: T) -> T:
    """A split tensor put together from all processes (each must call this) on the CPU; anything else as it is."""
    return value.full_tensor().cpu() if _is_split(value) else value  # type: ignore[attr-defined,no-any-return]


def split_like(value: Tensor, parameter: Tensor) -> Tensor:
    """`value`, whole and the same in every process, split as `parameter` is."""
    if not _is_split(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds, sharing its memory."""
    return tensor.detach().to_local() if _is_split(tensor) else tensor.detach()  # type: ignore[attr-defined,no-any-return]


def _is_split(value: object) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
