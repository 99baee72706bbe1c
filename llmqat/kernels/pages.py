"""Put weights on huge pages of 2 MiB: reading them misses the page tables less."""

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate, pairwise
from mmap import PAGESIZE
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.mapped import is_mapped

HUGE_PAGE, ALIGNMENT = 2 << 20, 64
MOVED_BYTES = 16 << 20  # at a time, so that little is in memory twice


def use_huge_pages(layers: Sequence[Any]) -> None:
    """Move the codes, scales and zero points of `PackedLinear` layers by `onto_huge_pages`."""
    names = ("weight_packed", "weight_scale", "weight_zero_point")
    places = [(layer, name) for layer in layers for name in names if getattr(layer, name) is not None]
    moved = onto_huge_pages([getattr(layer, name) for layer, name in places])
    for (layer, name), tensor in zip(places, moved, strict=True):
        setattr(layer, name, tensor)


def onto_huge_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies of tensors side by side on pages of 2 MiB; the tensors themselves where one lies in a file, or Linux gives
    no such pages.

    `tensors` are not to be used afterwards: their pages are given back, so that a model is not in memory twice.
    """
    sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    fit = all(tensor.device.type == "cpu" and tensor.is_contiguous() and not is_mapped(tensor) for tensor in tensors)
    if sum(sizes) < HUGE_PAGE or not fit or _overlap(tensors) or not _gives_huge_pages():
        return list(tensors)
    buffer = torch.empty(sum(sizes) + 2 * HUGE_PAGE, dtype=torch.uint8)
    buffer = buffer[-buffer.data_ptr() % HUGE_PAGE :]
    _madvise(buffer.data_ptr(), len(buffer) // HUGE_PAGE * HUGE_PAGE, 14)  # MADV_HUGEPAGE
    return [
        _move(tensor, buffer[end - size : end])
        for tensor, size, end in zip(tensors, sizes, accumulate(sizes), strict=True)
    ]


def _overlap(tensors: Sequence[Tensor]) -> bool:
    """Whether two of them share memory: the pages of the first would be gone before the second is read."""
    places = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in tensors)
    return any(start < end for (_, end), (start, _) in pairwise(places))


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
