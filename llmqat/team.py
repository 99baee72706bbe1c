"""The processes of a run as a team: who does which part of the work, and what all of them found.

They talk over gloo, on a connection without a time limit: a collective of NCCL gives up after ten minutes, and whoever
works on a layer or writes a checkpoint may take longer. A process that dies closes the connection, and the others fail.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from llmqat.processes import process_count, process_index

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
Named = list[tuple[str, "torch.Tensor"]]
NO_LIMIT = timedelta(days=365)


@dataclass(frozen=True)
class Team:
    """Processes that do one job together; each method that exchanges something must be called by all of them.

    Attributes:
        index: of this process.
        count: how many there are; alone, nothing is exchanged.
    """

    index: int = 0
    count: int = 1

    def share(self, items: Iterable[T]) -> list[T]:
        """Every `count`-th of the `items`: the part of this process."""
        return list(islice(items, self.index, None, self.count))

    def owner(self, item: int) -> int:
        """The process that has an item in its share."""
        return item % self.count

    def wait(self) -> None:
        """Wait until all have come this far, however long one of them takes."""
        if self.count > 1:
            import torch

            torch.distributed.barrier(group=connection())

    def all_of(self, value: T) -> list[T]:
        """The `value` of every process, in their order."""
        if self.count == 1:
            return [value]
        import torch

        found: list[Any] = [None] * self.count
        torch.distributed.all_gather_object(found, value, group=connection())
        return found

    def on_first(self, value: T | None, owner: int) -> T | None:
        """The `value` of its `owner` in the first process; in the others what they gave."""
        if owner != 0 and self.index in (0, owner):
            import torch

            if self.index == owner:
                torch.distributed.send_object_list([value], dst=0, group=connection())
            else:
                box: list[Any] = [None]
                torch.distributed.recv_object_list(box, src=owner, group=connection())
                return box[0]  # type: ignore[no-any-return]
        return value

    def tensors_of(self, owner: int, tensors: Named, device: "torch.device") -> Named:
        """The named `tensors` that process `owner` gives, on `device`; what the others give does not count."""
        if self.count == 1:
            return tensors
        import torch

        own = self.index == owner
        box = [[(name, tensor.shape, tensor.dtype) for name, tensor in tensors] if own else None]
        torch.distributed.broadcast_object_list(box, src=owner, group=connection())
        self.wait()  # on the connection without limit, and not in a collective of the devices
        found = tensors if own else [(n, torch.empty(shape, dtype=t, device=device)) for n, shape, t in box[0] or ()]
        found = [(name, tensor.contiguous()) for name, tensor in found]
        for _, tensor in found:
            torch.distributed.broadcast(tensor.view(-1).view(torch.uint8), src=owner)  # not every backend knows dtypes
        return found


ALONE = Team()


def whole_team() -> Team:
    """All processes of the run; once `torch.distributed` connects them."""
    return Team(process_index(), process_count())


@functools.cache
def connection() -> Any:
    """The group of all processes that waits without limit; opened by the first who asks, which all must do."""
    import torch

    return torch.distributed.new_group(backend="gloo", timeout=NO_LIMIT)
