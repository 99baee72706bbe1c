"""Kernels built for another processor, behind the interface of the loaded library: see server.cpp."""

import ctypes
import struct
import subprocess

from llmqat.kernels.native import Matrix

HAS_ISA, BEST_ISA, USE_ISA, SET_THREADS, LINEAR, ROWS, ARGMAX = range(7)
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

    def llmqat_set_threads(self, threads: int) -> int:
        return self._number(SET_THREADS, threads)

    def llmqat_linear(self, matrix: int, x: int, y: int, tokens: int, dtype: int) -> None:
        w = Matrix.from_address(matrix)
        self._with_layer(LINEAR, w, (x, tokens * getattr(w, "in") * WIDTHS[dtype]), (y, w.out), tokens, dtype)

    def llmqat_rows(self, matrix: int, index: int, count: int, y: int, dtype: int) -> None:
        w = Matrix.from_address(matrix)
        self._with_layer(ROWS, w, (index, count * 8), (y, getattr(w, "in")), count, dtype)

    def llmqat_argmax(self, x: int, count: int, dtype: int) -> int:
        sent = (b"",) * 4 + (ctypes.string_at(x, count * WIDTHS[dtype]),)
        return int.from_bytes(self._call(ARGMAX, count, 8, dtype, sent), "little")

    def _with_layer(self, operation: int, w: Matrix, sent: tuple, got: tuple, tokens: int, dtype: int) -> None:
        """`sent`: address and bytes of the input; `got`: address and width of the output."""
        buffers = (
            (w.codes, w.out * w.row_bytes),
            (w.scale, w.out * w.groups * WIDTHS[w.scale_dtype]),
            (w.zero_point, -(-w.out * w.bits // 32) * w.groups * 4),
            (w.bias, w.out * WIDTHS[w.bias_dtype]),
            sent,
        )
        data = [ctypes.string_at(address, size) if address else b"" for address, size in buffers]
        answer = self._call(operation, tokens, tokens * got[1] * WIDTHS[dtype], dtype, data, w)
        ctypes.memmove(got[0], answer, len(answer))
