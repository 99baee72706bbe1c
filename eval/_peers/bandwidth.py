"""The ceiling: how fast this machine reads memory, by a loop in C if there is a compiler, else by torch's sum."""

import ctypes
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("read.c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")


def read_in_c(library: Path, buffer_bytes: int, threads: int) -> Callable[[], object]:
    """A function that reads a buffer of its own once."""
    code = ctypes.CDLL(str(library))
    code.buffer_of.restype, code.buffer_of.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    code.read_all.restype, code.read_all.argtypes = ctypes.c_uint64, [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    data = code.buffer_of(buffer_bytes)
    if not data:
        raise MemoryError(f"no {buffer_bytes} bytes for the read buffer")
    if code.read_all(data, buffer_bytes, threads) != buffer_bytes // 8 * 0x0101010101010101 % 2**64:
        raise RuntimeError("the read loop did not read every word")
    return lambda: code.read_all(data, buffer_bytes, threads)


def read_in_torch(buffer_bytes: int, threads: int) -> Callable[[], object]:
    """The same by ``torch.sum`` of int64, which may stay below what the machine can do."""
    import torch

    torch.set_num_threads(threads)
    return torch.ones(buffer_bytes // 8, dtype=torch.int64).sum


class Worker:
    """Reads a buffer that no cache holds."""

    def __init__(self, threads: int, directory: Path) -> None:
        self.threads, self.directory = threads, directory
        self.compiler = shutil.which("cc") or shutil.which("gcc")
        self.method = f"{' '.join(('cc', *FLAGS))} read.c" if self.compiler else "torch.sum of int64"
        self.read: Callable[[], object] | None = None
        self.bytes = 0

    def describe(self) -> dict[str, Any]:
        """How it is read."""
        return {"method": self.method}

    def open(self, buffer_bytes: int) -> dict[str, Any]:
        """Make the buffer, rounded down to whole pages of every thread, and read it once."""
        self.bytes = max(1, buffer_bytes // (self.threads << 21)) * (self.threads << 21)
        if self.compiler is None:
            self.read = read_in_torch(self.bytes, self.threads)
        else:
            with tempfile.TemporaryDirectory() as scratch:
                library = Path(scratch) / "read.so"
                subprocess.run([self.compiler, *FLAGS, str(SOURCE), "-o", str(library)], check=True)
                self.read = read_in_c(library, self.bytes, self.threads)
        self.read()
        return {"bytes": self.bytes}

    def gb_s(self, seconds: float) -> float:
        """GB/s over at least `seconds`."""
        assert self.read is not None
        started, passes = time.perf_counter(), 0
        while (taken := time.perf_counter() - started) < seconds or not passes:
            self.read()
            passes += 1
        return self.bytes * passes / taken / 1e9
