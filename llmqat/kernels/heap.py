"""Keep freed memory in the process: the tensors of a training step then take it again and again.

Else the C library gives what a step has freed back to the system, and the next step takes it anew, page by page, with
an interrupt and a fill for each.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from threading import Lock
from typing import Any

from llmqat.machine import return_freed_memory

# Options of mallopt(3): how much free memory the heap may have at its end; the size of allocations that are mappings of
# their own, and how many of these there may be.
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
KEPT = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
# Where glibc's own rules end once large tensors were freed; an option that is set stops those rules for good.
USUAL = {MMAP_MAX: 1 << 16, MMAP_THRESHOLD: 32 << 20, TRIM_THRESHOLD: 64 << 20}

_lock, _users = Lock(), 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Keep what is freed inside the ``with``, and give it back at the end; without glibc do nothing."""
    _count(1)
    try:
        yield
    finally:
        _count(-1)


def _count(change: int) -> None:
    """Count another user, or one less; the first and the last one change the rules."""
    global _users
    with _lock:
        before, _users = _users, _users + change
        if not before:
            _set(KEPT)
        elif not _users:
            _set(USUAL)
            return_freed_memory()


def _set(options: dict[int, int]) -> None:
    for option, value in options.items():
        if (libc := _glibc()) is not None:
            libc.mallopt(option, value)


@cache
def _glibc() -> Any:
    """The C library; None if it is another one."""
    libc = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    return libc if hasattr(libc, "gnu_get_libc_version") else None
