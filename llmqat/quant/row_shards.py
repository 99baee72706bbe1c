"""Rows of a matrix divided over processes: each quantizes its own, and all of ``W_hat`` exists in the forward alone.

Groups lie along the inputs, so a shard of rows has whole groups: what a process finds for its rows are the bits that
one process alone finds for them. Values of ``W_hat`` are sent, as a rule in two bytes, not the masters behind them.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from torch import Tensor


@dataclass(frozen=True)
class RowShard:
    """Which rows of a matrix this process holds: all processes `size` rows, one after the other, the last ones fewer.

    Attributes:
        group: the processes among which the rows are divided.
        index: of this process among them.
        count: of these processes.
        total: rows of the whole matrix.
    """

    group: Any
    index: int
    count: int
    total: int

    @property
    def size(self) -> int:
        """Rows of a process."""
        return -(-self.total // self.count)

    @property
    def rows(self) -> slice:
        """The rows of this process in the whole matrix."""
        start = min(self.index * self.size, self.total)
        return slice(start, min(start + self.size, self.total))

    def gathered(self, rows: Tensor) -> Tensor:
        """The whole matrix of which each process has its `rows`. Collective: every process must call it."""
        sent = rows.new_zeros(self.size, *rows.shape[1:])
        sent[: len(rows)] = rows
        whole = rows.new_empty(self.size * self.count, *rows.shape[1:])
        # As bytes: not every backend knows every dtype.
        torch.distributed.all_gather_single(whole.view(torch.uint8), sent.view(torch.uint8), self.group)
        return whole[: self.total]

    def mean_of(self, whole: Tensor) -> Tensor:
        """The rows of this process in the mean of all processes' `whole` matrices. Collective.

        The mean, as FSDP2 takes it of the gradients of all other parameters.
        """
        sent = whole.new_zeros(self.size * self.count, *whole.shape[1:])
        torch.div(whole, self.count, out=sent[: self.total])
        rows = whole.new_empty(self.size, *whole.shape[1:])
        torch.distributed.reduce_scatter_single(rows, sent, group=self.group)
        own = self.rows
        return rows[: own.stop - own.start]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, shard: RowShard) -> Tensor:
        ctx.shard = shard
        return shard.gathered(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.shard.mean_of(grad), None


def narrower(*dtypes: torch.dtype) -> torch.dtype:
    """The first of the `dtypes` with the fewest bytes."""
    return min(dtypes, key=lambda dtype: dtype.itemsize)


def whole_weight(rows: Tensor, dtype: torch.dtype, shard: RowShard | None) -> Tensor:
    """A float weight in `dtype`, gathered if this process holds but its `rows`; differentiable."""
    if shard is not None:
        rows = _Gathered.apply(rows.to(narrower(dtype, rows.dtype)), shard)
    return rows.to(dtype)
