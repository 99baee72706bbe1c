"""Kernels built for another processor, behind the interface of the loaded library: see server.cpp."""

import ctypes
import struct
import subprocess

from llmqat.kernels.native import Matrix

HAS_ISA, BEST_ISA, USE_ISA, SET_THREADS, LINEAR = range(5)
WIDTHS = (4, 2, 2)  # bytes of an element, by the number of its dtype


class RemoteKernels:
    """What `native.library()` returns, for `command`, which runs the server under an emulator."""

    def __init__(self, command: list[str]) -> None:
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def _call(self, operation: int, argument: int, answer: int, dtype=0, sent=(b"",) * 5, matrix=None) -> bytes:
        sizes = (*map(len, sent), answer)
        header = struct.pack("<9q", operation, argument, dtype, *sizes) + bytes(matrix or Matrix())
        self._process.stdin.write(header + b"".join(sent))
        self._process.stdin.flush()
        received = self._process.stdout.read(answer)
        assert len(received) == answer, f"the kernel server ended with {self._process.wait()}"
        return received

    def _number(self, operation: int, argument: int = 0) -> int:
        return int.from_bytes(self._call(operation, argument, 4), "little", signed=True)

    def llmqat_has_isa(self, isa: int) -> int:
        return self._number(HAS_ISA, isa)

    def llmqat_best_isa(self) -> int:
        return self._number(BEST_ISA)

    def llmqat_use_isa(self, isa: int) -> int:
        return self._number(USE_ISA, isa)

    def llmqat_set_threads(self, threads: int) -> None:
        self._number(SET_THREADS, threads)

    def llmqat_linear(self, matrix: int, x: int, y: int, tokens: int, dtype: int) -> None:
        w = Matrix.from_address(matrix)
        in_features, entries = getattr(w, "in"), w.out * w.groups
        sizes = {
            w.codes: w.out * w.row_bytes,
            w.scale: entries * WIDTHS[w.scale_dtype],
            w.zero_point: -(-w.out * w.bits // 32) * w.groups * 4,
            w.bias: w.out * WIDTHS[w.bias_dtype],
            x: tokens * in_features * WIDTHS[dtype],
        }
        sent = [ctypes.string_at(p, sizes[p]) if p else b"" for p in (w.codes, w.scale, w.zero_point, w.bias, x)]
        answer = self._call(LINEAR, tokens, tokens * w.out * WIDTHS[dtype], dtype, sent, w)
        ctypes.memmove(y, answer, len(answer))
