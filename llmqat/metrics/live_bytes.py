"""Bytes of the tensors that are alive, and floating-point operations, counted while code runs."""

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils.flop_counter import flop_registry

from llmqat.compat.torch import watching_operators


class LiveBytes:
    """Counts what runs inside ``with counter.counting()``.

    A storage counts from the operator that makes it until its last tensor goes. Fake tensors count like real ones, so
    that the memory of a model can be found that fits no machine.

    Args:
        tensors: alive already.

    Attributes:
        current: bytes alive now.
        peak: the most that were alive at once.
        flops: of matrix products and attention, two for a multiplication with its addition.
    """

    def __init__(self, tensors: Iterable[Tensor] = ()) -> None:
        self.current = self.peak = self.flops = 0
        self.storages: dict[int, weakref.ref[Any]] = {}
        for tensor in tensors:
            self.hold(tensor)

    def hold(self, tensor: Tensor) -> None:
        """Count the storage of a tensor, once."""
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self.storages:
            return

        def release(_: object) -> None:
            self.current -= size
            self.storages.pop(key, None)

        self.storages[key] = weakref.ref(storage, release)
        self.current += size
        self.peak = max(self.peak, self.current)

    @contextmanager
    def counting(self) -> Iterator["LiveBytes"]:
        """Count the operators that run inside the ``with``."""
        with watching_operators(self._see):
            yield self

    def _see(self, operator: Any, args: Any, kwargs: dict[str, Any], result: Any) -> None:
        formula = flop_registry.get(operator.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=result)
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
