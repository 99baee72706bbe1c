"""Sharded parameters (FSDP2): a `DTensor`, of which each process holds the shard of some rows."""

import torch
from torch import Tensor

from llmqat.processes import is_first

def gathered(tensor: Tensor, *, everywhere: bool = False, copied: bool = False) -> Tensor | None:
    """The full tensor of a sharded one, on the CPU of the first process; None in the others. Collective.

    Args:
        tensor: sharded or not.
        everywhere: in every process, not in the first alone.
        copied: one that is not sharded is copied to the CPU too, rather than taken as it is.
    """
    sharded = _is_sharded(tensor)
    whole = tensor.full_tensor() if sharded else tensor  # type: ignore[attr-defined]
    if not (everywhere or is_first()):
        return None
    return whole.detach().to("cpu", copy=not sharded) if sharded or copied else whole  # type: ignore[no-any-return]


def sharded_like(value: Tensor, parameter: Tensor) -> Tensor:
    """A full tensor, the same in every process, sharded as `parameter` is."""
    if not _is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def from_shard(shard: Tensor, parameter: Tensor) -> Tensor:
    """A sharded tensor like `parameter`, of which this process holds `shard`; the shard itself if it is not sharded."""
    if not _is_sharded(parameter):
        return shard
    from torch.distributed.tensor import DTensor

    layout = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    shard = shard.to(parameter.device)
    return DTensor.from_local(shard, *layout, shape=parameter.shape, stride=parameter.stride())  # type: ignore[no-any-return]


def local_shard(tensor: Tensor) -> Tensor:
    """The shard of a tensor that this process holds, on the same memory."""
    return tensor.detach().to_local() if _is_sharded(tensor) else tensor.detach()  # type: ignore[attr-defined,no-any-return]


def _is_sharded(value: object) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
