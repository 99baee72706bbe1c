"""Mixers that stand in the place of attention, and that Python computes: `llmqat_mix` of csrc/core/decoder.h."""

import ctypes
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_Mix = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p)


class Mixing:
    """A function that the library calls back.

    Attributes:
        address: of the C function.
    """

    def __init__(self, mix: Callable[[int, Tensor], Tensor], hidden: int, dtype: torch.dtype) -> None:
        """Make the C function.

        Args:
            mix: from the number of a block and its normed hidden states ``(m, hidden)`` to what takes the place of
                attention, of the same shape.
            hidden: features of the hidden states.
            dtype: of both.
        """
        self._mix, self._hidden, self._dtype = mix, hidden, dtype
        self._function, self._error = _Mix(self._call), list[BaseException]()
        self.address = ctypes.cast(self._function, ctypes.c_void_p).value

    def _call(self, block: int, x: int, tokens: int, y: int) -> int:
        try:
            self._at(y, tokens).copy_(self._mix(block, self._at(x, tokens).clone()))
        except BaseException as error:
            self._error.append(error)
            return 1
        return 0

    def _at(self, address: int, tokens: int) -> Tensor:
        """The memory at an address as a tensor ``(tokens, hidden)``."""
        memory = (ctypes.c_char * (tokens * self._hidden * self._dtype.itemsize)).from_address(address)
        return torch.frombuffer(memory, dtype=self._dtype).view(tokens, self._hidden)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise what `mix` raised, and not the word of the library that it failed."""
        try:
            yield
        except Exception:
            if self._error:
                raise self._error.pop() from None
            raise
