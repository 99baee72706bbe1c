"""The compiled CPU kernels (`csrc/`), through ctypes. Absent or unfit, the torch reference of `ops` runs.

`LLMQAT_KERNELS` forces one: ``reference`` or ``portable``; ``avx2``, ``avxvnni``, ``avx512`` or ``amx`` on x86-64;
``neon``, ``dotprod`` or ``i8mm`` on aarch64.
"""

import ctypes
import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmqat.kernels
from llmqat.errors import LlmqatError
from llmqat.kernels.packed import Packed, check_index, check_input, check_packed
from llmqat.progress import log

LIBRARY = "_kernels.so"
SOURCES = Path(__file__).with_name("csrc") / "core"  # of an editable install
# Names by the number of `llmqat_isa` in csrc/core/llmqat.h.
ISAS = ("portable", "neon", "dotprod", "i8mm", "avx2", "avxvnni", "avx512", "amx")
REFERENCE = "reference"
TRITON = "triton"  # the kernels of GPUs, llmqat/kernels/gpu
# What the functions that compute return: negative numbers are errors.
RESULTS = {
    **dict.fromkeys(("llmqat_linear", "llmqat_linears", "llmqat_rows", "llmqat_decode"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_multiply", "llmqat_sum_adapters"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_fake_quantize", "llmqat_grid_gradients"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_norm_forward", "llmqat_norm_backward", "llmqat_rotate"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_gate_forward", "llmqat_gate_backward"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_attend", "llmqat_attend_backward", "llmqat_seen_keys"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_find_losses", "llmqat_find_state_errors"), ctypes.c_int32),
    **dict.fromkeys(("llmqat_next_token", "llmqat_argmax"), ctypes.c_int64),
    "llmqat_read_bandwidth": ctypes.c_double,
}
CPU = torch.device("cpu")
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
    """Whether the library has the interface of the headers in `sources`; not so after an update without an install."""
    headers = [sources / name for name in ("llmqat.h", "decoder.h", "training.h")]
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


def use_threads(kernels: Any) -> None:
    """Give the next kernel its `threads`; where the system starts fewer, say so."""
    wanted = threads()
    count = kernels.llmqat_set_threads(wanted)
    if count < wanted:
        _say_fewer(count, wanted)


@cache
def _say_fewer(count: int, wanted: int) -> None:
    """Say once that there are fewer threads than were asked for."""
    log(
        f"the compiled kernels run on {count} threads, not {wanted}: they use at most 256, and the system may start "
        "fewer (limits of processes and memory); ask for no more, by OMP_NUM_THREADS"
    )


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


def kernel_name(device: torch.device | str = "cpu") -> str:
    """Name of what runs `packed_linear` on a device here, as reports print it."""
    from llmqat.kernels.gpu.available import runs_inference_on

    there, kernels = torch.device(device), library()
    if there.type != "cpu":
        return TRITON if runs_inference_on(there) else REFERENCE
    if kernels is None:
        return REFERENCE
    return os.environ.get("LLMQAT_KERNELS") or available()[-1]


def explain() -> str:
    """One line: the kernels that run here, those that could, and why there are no others."""
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


def matrix(packed: Packed) -> Matrix:
    """The struct of a layer. It borrows the tensors: keep them alive, and where they are, while it is used.

    Raises:
        LlmqatError: if the layer is no valid one, or the library cannot read its tensors as they lie.
    """
    check_packed(packed)
    for name, tensor in zip(packed._fields, packed[:4], strict=False):
        if tensor is not None:
            _check_place(f"{name} of a packed layer", tensor)
    for name, tensor in (("scale", packed.scale), ("bias", packed.bias)):
        if tensor is not None:
            check_dtype(name, tensor)
    return _struct(packed)


def check_memory(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device = CPU
) -> None:
    """Refuse a tensor of which kernels would read, or write, other memory than its own.

    Raises:
        LlmqatError: for another shape or dtype, for gaps, and beyond `device`.
    """
    if tensor.shape != shape or tensor.dtype != dtype:
        raise LlmqatError(f"the {name} must be {dtype} {tuple(shape)}, got {tensor.dtype} {tuple(tensor.shape)}")
    _check_place(name, tensor, device)


def check_dtype(name: str, tensor: Tensor) -> None:
    """Refuse floats that the library does not know.

    Raises:
        LlmqatError: with the one to cast to.
    """
    if tensor.dtype not in DTYPES:
        raise LlmqatError(f"the compiled kernels read no {name} of {tensor.dtype}; cast it to torch.float32")


def _check_place(name: str, tensor: Tensor, device: torch.device = CPU) -> None:
    if tensor.device != device or tensor.layout != torch.strided or not tensor.is_contiguous():
        layout = f"with strides {tensor.stride()}" if tensor.layout == torch.strided else "sparse"
        place = "the CPU" if device == CPU else device
        raise LlmqatError(
            f"the {name} must lie on {place}, contiguous; it is on {tensor.device} {layout}: call .contiguous()"
        )


def _struct(packed: Packed) -> Matrix:
    codes, scale, zero_point, bias, bits, in_features, act_bits = packed
    return Matrix(
        codes.data_ptr(),
        scale.data_ptr(),
        None if zero_point is None else zero_point.data_ptr(),
        None if bias is None else bias.data_ptr(),
        codes.shape[0],
        in_features,
        scale.shape[1],
        codes.shape[1] * 4,
        bits,
        DTYPES[scale.dtype],
        0 if bias is None else DTYPES[bias.dtype],
        act_bits or 0,
    )


class Layer:
    """A layer that is called again and again: its struct is made once."""

    def __init__(self, packed: Packed) -> None:
        """Take the arguments of `matrix`, and refuse the same."""
        self._packed, self._matrix = packed, matrix(packed)

    def linear(self, x: Tensor) -> Tensor:
        """``(..., out)`` of `x` ``(..., in)``, as `ops.packed_linear`; `supports` has said yes."""
        check_input(x, self._packed)
        check_dtype("x", x)
        return _linear(x, self._matrix)

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` ``(n,)`` of ``W_hat``: ``(n, in)`` in the dtype of its scales.

        Raises:
            LlmqatError: if there is no such row.
        """
        check_index(index, self._packed)
        kernels = library()
        assert kernels is not None
        index, dtype = index.to(torch.int64).contiguous(), self._packed.scale.dtype
        y = torch.empty(index.numel(), self._packed.in_features, dtype=dtype)
        use_threads(kernels)
        kernels.llmqat_rows(
            ctypes.addressof(self._matrix), index.data_ptr(), index.numel(), y.data_ptr(), DTYPES[dtype]
        )
        return y


def linear(x: Tensor, packed: Packed) -> Tensor:
    """`ops.packed_linear` by the compiled kernels, of a checked layer; `supports` has said yes."""
    codes, scale, zero_point, bias, bits, in_features, act_bits = packed
    if bias is not None:
        bias = (bias if bias.dtype in DTYPES else bias.float()).contiguous()
    zero_point = None if zero_point is None else zero_point.contiguous()
    borrowed = Packed(codes.contiguous(), scale.contiguous(), zero_point, bias, bits, in_features, act_bits)
    return _linear(x, _struct(borrowed))


def _linear(x: Tensor, matrix: Matrix) -> Tensor:
    kernels = library()
    assert kernels is not None
    x = x.contiguous()
    y = torch.empty(*x.shape[:-1], matrix.out, dtype=x.dtype)
    use_threads(kernels)
    tokens = x.numel() // x.shape[-1]
    kernels.llmqat_linear(ctypes.addressof(matrix), x.data_ptr(), y.data_ptr(), tokens, DTYPES[x.dtype])
    return y


def argmax(x: Tensor) -> int:
    """Where the largest value of `x` ``(n,)`` is: of equal ones the first, and a NaN before all others.

    Raises:
        LlmqatError: if the library cannot read `x` as it lies, or there are no values.
    """
    _check_place("values", x)
    check_dtype("values", x)
    kernels = library()
    assert kernels is not None
    use_threads(kernels)
    return int(kernels.llmqat_argmax(x.data_ptr(), x.numel(), DTYPES[x.dtype]))


def read_bandwidth(data: Tensor) -> float:
    """Bytes per second of reading `data` once, with torch's number of threads and the streams of the kernels.

    Raises:
        LlmqatError: if there are no compiled kernels, or `data` is less than they measure by, or has gaps.
    """
    _check_place("data", data)
    kernels = library()
    if kernels is None:
        raise LlmqatError(f"no compiled kernels: {explain()}")
    use_threads(kernels)
    return float(kernels.llmqat_read_bandwidth(data.data_ptr(), data.numel() * data.element_size()))
