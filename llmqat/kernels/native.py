"""The compiled CPU kernels (`csrc/`), through ctypes. Absent or unfit, the torch reference of `ops` runs.

`LLMQAT_KERNELS` forces one: ``reference`` or ``portable``; ``avx2``, ``avxvnni``, ``avx512`` or ``amx`` on x86-64;
``neon``, ``dotprod`` or ``i8mm`` on aarch64.
"""

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import accumulate
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmqat.kernels
from llmqat.errors import LlmqatError

LIBRARY = "_kernels.so"
SOURCES = Path(__file__).with_name("csrc") / "core"  # of an editable install
# Names by the number of `llmqat_isa` in csrc/core/llmqat.h.
ISAS = ("portable", "neon", "dotprod", "i8mm", "avx2", "avxvnni", "avx512", "amx")
REFERENCE = "reference"
# What the functions that compute return: negative numbers are errors.
RESULTS = {
    **dict.fromkeys(("llmqat_linear", "llmqat_linears", "llmqat_rows", "llmqat_decode"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_next_token", "llmqat_argmax"), ctypes.c_int64),
    "llmqat_read_bandwidth": ctypes.c_double,
}
HUGE_PAGE, ALIGNMENT = 2 << 20, 64
MOVED_BYTES = 16 << 20  # at a time, so that little is in memory twice
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Matrix(ctypes.Structure):
    """`llmqat_matrix` of csrc/core/llmqat.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("codes", "scale", "zero_point", "bias")),
        *((name, ctypes.c_int64) for name in ("out", "in", "groups", "row_bytes")),
        *((name, ctypes.c_int32) for name in ("bits", "scale_dtype", "bias_dtype", "act_bits")),
    )


@cache
def library_path() -> Path | None:
    """The shared library, or None where the package was installed without a compiler."""
    # An editable install has two folders: the sources, and what was built.
    return next((path for folder in llmqat.kernels.__path__ if (path := Path(folder) / LIBRARY).exists()), None)


@cache
def library() -> ctypes.CDLL | None:
    """The loaded library with the instruction set that `LLMQAT_KERNELS` asks for, by default the best; else None.

    Raises:
        LlmqatError: if `LLMQAT_KERNELS` names no kernel, or one that cannot run here; or if the library was built from
            other sources than those beside this file.
    """
    wanted = os.environ.get("LLMQAT_KERNELS", "")
    if wanted not in ("", REFERENCE, *ISAS):
        raise LlmqatError(f"LLMQAT_KERNELS={wanted} is none of {', '.join((REFERENCE, *ISAS))}")
    path = library_path()
    if wanted == REFERENCE or (path is None and not wanted):
        return None
    if path is None:
        raise LlmqatError(f"LLMQAT_KERNELS={wanted}, but llmqat was installed without a C++ compiler; install it again")
    loaded = ctypes.CDLL(str(path))
    if not _fits(loaded, SOURCES):
        raise LlmqatError(f"{path} was built from other sources than these: install llmqat again")
    loaded.llmqat_linear.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    loaded.llmqat_linears.argtypes = [ctypes.c_void_p, ctypes.c_int64, *loaded.llmqat_linear.argtypes[1:]]
    loaded.llmqat_rows.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_int32]
    loaded.llmqat_next_token.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    loaded.llmqat_argmax.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32]
    loaded.llmqat_read_bandwidth.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    loaded.llmqat_error.restype = ctypes.c_char_p
    for name, restype in RESULTS.items():
        function = getattr(loaded, name)
        function.restype, function.errcheck = restype, _checked
    if wanted and loaded.llmqat_use_isa(ISAS.index(wanted)):
        raise LlmqatError(f"LLMQAT_KERNELS={wanted} cannot run on this machine; it has {', '.join(available())}")
    if not wanted:
        loaded.llmqat_use_isa(loaded.llmqat_best_isa())
    return loaded


def _checked(result: float, function: Any, _: Any) -> float:
    """`result` of a function of the library, which is negative after an error."""
    if result < 0:
        loaded = library()
        assert loaded is not None
        raise LlmqatError(f"{function.__name__}: {loaded.llmqat_error().decode()}")
    return result


def _fits(loaded: ctypes.CDLL, sources: Path) -> bool:
    """Whether `loaded` has the interface of `sources`, if there are any: not after an update without an install."""
    headers = [sources / name for name in ("llmqat.h", "decoder.h")]
    if not all(header.exists() for header in headers):
        return True
    if not hasattr(loaded, "llmqat_interface"):
        return False
    loaded.llmqat_interface.restype = ctypes.c_char_p
    interface: bytes = loaded.llmqat_interface()
    return interface.decode() == "".join(hashlib.sha256(header.read_bytes()).hexdigest() for header in headers)


_threads = threading.local()


def threads() -> int:
    """Threads of the next kernel called from this thread: torch's number, unless `own_threads` keeps torch to one."""
    return getattr(_threads, "own", None) or torch.get_num_threads()


@contextmanager
def own_threads() -> Iterator[None]:
    """Leave torch's threads to the kernels; operators of torch run on one meanwhile.

    Workers of torch's OpenMP pool spin for milliseconds after each parallel operator, on the cores of the kernels.
    """
    before, total = getattr(_threads, "own", None), torch.get_num_threads()
    _threads.own = before or total
    torch.set_num_threads(1)
    try:
        yield
    finally:
        _threads.own = before
        torch.set_num_threads(total)


def available() -> list[str]:
    """Instruction sets that were compiled in and can run here, the best last."""
    path = library_path()
    if path is None:
        return []
    loaded = ctypes.CDLL(str(path))
    return [name for number, name in enumerate(ISAS) if loaded.llmqat_has_isa(number)]


def kernel_name() -> str:
    """Name of what runs `packed_linear` on a CPU here, as reports print it."""
    if library() is None:
        return REFERENCE
    return os.environ.get("LLMQAT_KERNELS") or available()[-1]


def explain() -> str:
    """One line: what runs, what else could, and why not more."""
    if library_path() is None:
        return f"{REFERENCE}: llmqat was installed without a C++ compiler; install one and install llmqat again"
    forced = ", forced by LLMQAT_KERNELS" if os.environ.get("LLMQAT_KERNELS") else ""
    missing = [name for name in ISAS if name not in available()]
    return f"{kernel_name()}{forced}; can run {', '.join(available())}; not on this machine: {', '.join(missing)}"


def supports(x: Tensor, weight_scale: Tensor, in_features: int) -> bool:
    """Whether the compiled kernels take this call: on a CPU, no float64, groups of a multiple of 16 or whole rows."""
    groups = weight_scale.shape[1]
    fits = groups == 1 or (in_features // groups) % 16 == 0
    known = x.dtype in DTYPES and weight_scale.dtype in DTYPES
    return fits and known and x.device.type == "cpu" and library() is not None


def matrix(
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    act_bits: int | None,
) -> Matrix:
    """The struct of a layer. It borrows the tensors, all contiguous: keep them alive while it is used."""
    return Matrix(
        weight_packed.data_ptr(),
        weight_scale.data_ptr(),
        None if weight_zero_point is None else weight_zero_point.data_ptr(),
        None if bias is None else bias.data_ptr(),
        weight_packed.shape[0],
        in_features,
        weight_scale.shape[1],
        weight_packed.shape[1] * 4,
        bits,
        DTYPES[weight_scale.dtype],
        0 if bias is None else DTYPES[bias.dtype],
        act_bits or 0,
    )


class Layer:
    """A layer that is called again and again: its struct is made once, of arguments as `matrix` takes them."""

    def __init__(self, *arguments: Any) -> None:
        self._kept, self._matrix = arguments, matrix(*arguments)
        self._in, self._dtype = getattr(self._matrix, "in"), arguments[1].dtype

    def linear(self, x: Tensor) -> Tensor:
        """``(..., out)`` of `x` ``(..., in)``, contiguous, as `ops.packed_linear`; `supports` has said yes."""
        kernels = library()
        assert kernels is not None
        y = torch.empty(*x.shape[:-1], self._matrix.out, dtype=x.dtype)
        kernels.llmqat_set_threads(threads())
        tokens, dtype = x.numel() // self._in, DTYPES[x.dtype]
        kernels.llmqat_linear(ctypes.addressof(self._matrix), x.data_ptr(), y.data_ptr(), tokens, dtype)
        return y

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` ``(n,)``, contiguous, of ``W_hat``: ``(n, in)`` in the dtype of its scales."""
        kernels = library()
        assert kernels is not None
        y = torch.empty(index.numel(), self._in, dtype=self._dtype)
        kernels.llmqat_set_threads(threads())
        kernels.llmqat_rows(
            ctypes.addressof(self._matrix), index.data_ptr(), index.numel(), y.data_ptr(), DTYPES[self._dtype]
        )
        return y


def linear(
    x: Tensor,
    weight_packed: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None,
    bias: Tensor | None,
    bits: int,
    in_features: int,
    act_bits: int | None,
) -> Tensor:
    """`ops.packed_linear` by the compiled kernels; `supports` has said yes."""
    zero_point = None if weight_zero_point is None else weight_zero_point.contiguous()
    bias = None if bias is None else (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    weights = (weight_packed.contiguous(), weight_scale.contiguous(), zero_point, bias)
    return Layer(*weights, bits, in_features, act_bits).linear(x.contiguous())


def rows(index: Tensor, *arguments: Any) -> Tensor:
    """Rows `index` ``(n,)`` of ``W_hat``, ``(n, in)`` in the dtype of its scales; `arguments` are those of `matrix`."""
    return Layer(*arguments).rows(index.contiguous())


def argmax(x: Tensor) -> int:
    """Where the largest value of `x` ``(n,)``, contiguous, is: of equal ones the first, and a NaN before all others."""
    kernels = library()
    assert kernels is not None
    kernels.llmqat_set_threads(threads())
    return int(kernels.llmqat_argmax(x.data_ptr(), x.numel(), DTYPES[x.dtype]))


def use_huge_pages(layers: Sequence[Any]) -> None:
    """Move what the kernels read of packed layers, by `onto_huge_pages`."""
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    places = [(layer, name) for layer in layers for name in names if getattr(layer, name) is not None]
    moved = onto_huge_pages([getattr(layer, name) for layer, name in places])
    for (layer, name), tensor in zip(places, moved, strict=True):
        setattr(layer, name, tensor)


def onto_huge_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same values side by side on pages of 2 MiB, where Linux gives them: reading them misses the page tables less.

    `tensors` are not to be used afterwards: their pages are given back, so that a model is not in memory twice.
    """
    sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    fit = all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
    if sum(sizes) < HUGE_PAGE or not fit or not _gives_huge_pages():
        return list(tensors)
    buffer = torch.empty(sum(sizes) + 2 * HUGE_PAGE, dtype=torch.uint8)
    buffer = buffer[-buffer.data_ptr() % HUGE_PAGE :]
    _madvise(buffer.data_ptr(), len(buffer) // HUGE_PAGE * HUGE_PAGE, 14)  # MADV_HUGEPAGE
    return [
        _move(tensor, buffer[end - size : end])
        for tensor, size, end in zip(tensors, sizes, accumulate(sizes), strict=True)
    ]


def _move(tensor: Tensor, place: Tensor) -> Tensor:
    """Copy to `place`, and give back whole pages of the source as soon as they are copied."""
    old = tensor.view(-1).view(torch.uint8)
    kept = -(-old.data_ptr() // PAGESIZE) * PAGESIZE
    for first in range(0, len(old), MOVED_BYTES):
        part = slice(first, min(first + MOVED_BYTES, len(old)))
        place[part] = old[part]
        end = (old.data_ptr() + part.stop) // PAGESIZE * PAGESIZE
        if end > kept:
            _madvise(kept, end - kept, 4)  # MADV_DONTNEED
            kept = end
    return place[: len(old)].view(tensor.dtype).view(tensor.shape)


def _madvise(start: int, length: int, advice: int) -> None:
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.madvise(start, length, advice)


@cache
def _gives_huge_pages() -> bool:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return setting.exists() and "[never]" not in setting.read_text()


def read_bandwidth(data: Tensor) -> float:
    """Bytes per second of reading `data` once, with torch's number of threads and the streams of the kernels.

    Raises:
        LlmqatError: if there are no compiled kernels.
    """
    kernels = library()
    if kernels is None:
        raise LlmqatError(f"no compiled kernels: {explain()}")
    kernels.llmqat_set_threads(threads())
    return float(kernels.llmqat_read_bandwidth(data.data_ptr(), data.numel() * data.element_size()))
