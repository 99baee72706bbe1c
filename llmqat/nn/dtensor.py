"""Sharded parameters (FSDP2): a `DTensor`, of which each process holds the shard of some rows."""

from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def gathered(value: T) -> T:
    """The full tensor of a sharded one, on the CPU; anything else as it is. Collective: every process must call it."""
    return value.full_tensor().cpu() if _is_sharded(value) else value  # type: ignore[attr-defined,no-any-return]


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, the same in every process, sharded as `parameter` is."""
    if not _is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, on the same memory."""
    return tensor.detach().to_local() if _is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined,no-any-return]


def _is_sharded(value: object) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
