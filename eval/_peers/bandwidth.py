"""The ceiling: how fast this machine reads memory, by a loop in C if there is a compiler, else by torch's sum."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("read.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
STREAMS = (2, 4, 8)  # which is best differs between machines
PAGE = 1 << 21


def readers_in_c(compiler: str, buffer_bytes: int, threads: int) -> list[Callable[[], object]]:
    """Functions that read one buffer once, in different numbers of streams."""
    with tempfile.TemporaryDirectory() as scratch:
        library = Path(scratch) / "read.so"
        subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True)
        code = ctypes.CDLL(str(library))
    code.buffer_of.restype, code.buffer_of.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    code.read_all.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int]
    code.read_all.restype = ctypes.c_uint64
    data = code.buffer_of(buffer_bytes)
    if not data:
        raise MemoryError(f"no {buffer_bytes} bytes for the read buffer")
    readers = [functools.partial(code.read_all, data, buffer_bytes, threads, streams) for streams in STREAMS]
    if any(reader() != buffer_bytes // 8 * 0x0101010101010101 % 2**64 for reader in readers):
        raise RuntimeError("read.c did not read every word")
    return readers


def readers_in_torch(buffer_bytes: int, threads: int) -> list[Callable[[], object]]:
    """The same by ``torch.sum`` of int64, which may stay below what the machine can do."""
    import torch

    torch.set_num_threads(threads)
    return [torch.ones(buffer_bytes // 8, dtype=torch.int64).sum]


class Worker:
    """Reads a buffer that no cache holds."""

    def __init__(self, threads: int, directory: Path) -> None:
        self.threads, self.directory = threads, directory
        self.compiler = shutil.which("cc") or shutil.which("gcc")
        self.readers: list[Callable[[], object]] = []
        self.bytes = 0

    def describe(self) -> dict[str, Any]:
        """How it is read."""
        in_c = f"{' '.join(('cc', *FLAGS))} read.c, the best of {', '.join(map(str, STREAMS))} streams, 2 MiB pages"
        return {"method": in_c if self.compiler else "torch.sum of int64"}

    def open(self, buffer_bytes: int) -> dict[str, Any]:
        """Make the buffer, in whole pages, unless it is there."""
        wanted = max(1, buffer_bytes // PAGE) * PAGE
        if wanted != self.bytes:
            self.bytes = wanted
            if self.compiler is None:
                self.readers = readers_in_torch(wanted, self.threads)
            else:
                self.readers = readers_in_c(self.compiler, wanted, self.threads)
        return {"bytes": self.bytes}

    def gb_s(self, seconds: float) -> float:
        """GB/s of the fastest reader; all of them together take at least `seconds`."""
        return max(self.rate(reader, seconds / len(self.readers)) for reader in self.readers)

    def rate(self, reader: Callable[[], object], seconds: float) -> float:
        """GB/s over at least `seconds`."""
        passes, started = 0, time.perf_counter()
        while True:
            reader()
            passes += 1
            taken = time.perf_counter() - started
            if taken >= seconds:
                return self.bytes * passes / taken / 1e9
