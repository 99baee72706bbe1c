"""Sharded parameters (FSDP2): a `DTensor`, of which each process holds the shard of some rows."""

from typing import Any

import torch
from torch import Tensor, nn

from llmqat.processes import is_first
from llmqat.quant.row_shards import RowShard


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


def divided(parameter: nn.Parameter, mesh: Any) -> nn.Parameter:
    """A parameter whose rows the processes of `mesh` divide, of which this one copies its own."""
    from torch.distributed.tensor import DTensor, Shard

    shard = RowShard(mesh.get_group(), mesh.get_local_rank(), mesh.size(), len(parameter))
    own = parameter.detach()[shard.rows].clone()
    whole = DTensor.from_local(own, mesh, [Shard(0)], shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(whole, parameter.requires_grad)


def row_shard(tensor: Tensor) -> RowShard | None:
    """The rows of a sharded tensor that this process holds; None for one that is not sharded."""
    if not _is_sharded(tensor):
        return None
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return RowShard(mesh.get_group(), mesh.get_local_rank(), mesh.size(), len(tensor))


def own_rows(tensor: Tensor, shard: RowShard | None) -> Tensor:
    """The rows of `shard`, of a tensor that is sharded alike or whole; differentiable. All where there is no shard."""
    if shard is None:
        return tensor
    return tensor.to_local() if _is_sharded(tensor) else tensor[shard.rows]  # type: ignore[attr-defined,no-any-return]


def _is_sharded(value: object) -> bool:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return False
    from torch.distributed.tensor import DTensor

    return isinstance(value, DTensor)
