"""Tensors in files: mapped from safetensors, or put on the disk for as long as the process lives.

Their memory is that of files, read-only: the system reads a page when it is used, and may take it back at any time. A
process with many times its memory of such tensors runs; `release` keeps what it does not use out of memory.
"""

import json
import mmap
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.files import PARTIAL, storage_problem

# Names of dtypes in the headers of safetensors.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SEGMENT_BYTES = 1 << 30  # of a growing file, mapped at a time: every map keeps a file open
DONT_NEED, WILL_NEED = "MADV_DONTNEED", "MADV_WILLNEED"  # not on every system


class _Map(mmap.mmap):
    """A read-only map of a file, which knows its address."""

    @property
    def address(self) -> int:
        """Address of its first byte."""
        return _view(self, torch.uint8, 1, 0).data_ptr()


# Address of a mapped tensor -> the map that it lies in, for as long as that lives. A map goes after all its tensors.
_MAPS: "WeakValueDictionary[int, _Map]" = WeakValueDictionary()


def _mapped(file: IO[bytes], length: int, offset: int = 0) -> _Map:
    return _Map(file.fileno(), length, access=mmap.ACCESS_READ, offset=offset)


def _view(place: _Map, dtype: torch.dtype, count: int, start: int) -> Tensor:
    with warnings.catch_warnings():  # torch has no read-only tensors: nobody may write to these
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(place, dtype=dtype, count=count, offset=start)


def _tensor(place: _Map, dtype: torch.dtype, shape: Iterable[int], start: int) -> Tensor:
    """A tensor on bytes of a map, from `start` on."""
    size = torch.Size(shape)
    if size.numel() == 0:
        return torch.empty(size, dtype=dtype)
    tensor = _view(place, dtype, size.numel(), start).view(size)
    _MAPS[tensor.data_ptr()] = place
    return tensor


def mapped_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name, mapped; nothing but the header is read.

    Raises:
        SafetensorError, OSError: see `safetensors.safe_open`, which has to be able to open the file.
    """
    from safetensors import safe_open

    with safe_open(path, framework="np"):
        pass  # it checks that the header fits the file
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        place = _mapped(file, path.stat().st_size)
    header.pop("__metadata__", None)
    unknown = sorted({entry["dtype"] for entry in header.values()} - set(DTYPES))
    if unknown:
        raise LlmqatError(f"{path} holds tensors of {unknown[0]}; write the model again in {', '.join(DTYPES)}")
    return {
        name: _tensor(place, DTYPES[entry["dtype"]], entry["shape"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


class Disk:
    """Room for tensors in a file without a name, which goes with the process, however that ends.

    Args:
        directory: where there is as much space as is put here.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.file = tempfile.TemporaryFile(dir=directory, prefix=PARTIAL)  # noqa: SIM115 - lives as long as this
        self.place: _Map | None = None
        self.start = self.used = self.end = 0  # of the segment that is being filled, in the file

    def put(self, tensor: Tensor) -> Tensor:
        """Write a tensor to the disk, if it is not there in its layout; returns it mapped, not to be written to.

        Raises:
            LlmqatError: if there is no space for it.
        """
        if is_mapped(tensor) and tensor.is_contiguous():
            return tensor
        values = tensor.detach().cpu().contiguous()
        raw = values.view(-1).view(torch.uint8)
        try:
            place = self._room_for(len(raw))
            self.file.seek(self.used)
            self.file.write(raw.numpy().data)
            self.file.flush()
        except OSError as error:
            raise LlmqatError(
                f"cannot write to {self.directory} {values.nbytes >> 20} MB: {storage_problem(error)}; free some "
                "space, or choose another --output"
            ) from error
        found = _tensor(place, values.dtype, values.shape, self.used - self.start)
        self.used += -(-len(raw) // mmap.PAGESIZE) * mmap.PAGESIZE
        return found

    def _room_for(self, size: int) -> _Map:
        """The map of the segment in which the next `size` bytes lie."""
        if self.place is None or self.used + size > self.end:
            self.start = self.used = self.end
            self.end += -(-max(size, SEGMENT_BYTES) // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self.file.truncate(self.end)  # a hole, until it is written
            self.place = _mapped(self.file, self.end - self.start, self.start)
        return self.place


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor, or what it is a view of, lies in a file."""
    return _place_of(tensor) is not None


def in_files(model: torch.nn.Module) -> bool:
    """Whether a parameter of a model lies in a file."""
    return any(is_mapped(parameter) for parameter in model.parameters())


def release(*tensors: Tensor | None) -> None:
    """Let go of the memory of tensors that lie in files, until they are used again; of others, nothing."""
    _advise(DONT_NEED, tensors)


def will_need(*tensors: Tensor | None) -> None:
    """Begin to read tensors that lie in files."""
    _advise(WILL_NEED, tensors)


def _place_of(tensor: Tensor) -> _Map | None:
    if tensor.device.type != "cpu" or tensor.numel() == 0:
        return None
    return _MAPS.get(tensor.untyped_storage().data_ptr())


def _advise(advice: str, tensors: Iterable[Tensor | None]) -> None:
    for tensor in tensors:
        place = None if tensor is None else _place_of(tensor)
        if tensor is None or place is None or not hasattr(mmap, advice):
            continue
        storage = tensor.untyped_storage()
        first = storage.data_ptr() - place.address
        start = first // mmap.PAGESIZE * mmap.PAGESIZE
        place.madvise(getattr(mmap, advice), start, first + storage.nbytes() - start)
