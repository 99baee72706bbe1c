"""Facts about the machine, and what a process keeps of its memory."""

import ctypes
from pathlib import Path

import pytest
import torch

from llmqat.machine import return_freed_memory


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not on glibc")
def test_memory_freed_between_what_lives_on_goes_back():
    pieces = [torch.ones(25_000) for _ in range(600)]  # each of them too small to be mapped by itself
    before = resident()
    del pieces[1::2], pieces[::3]
    return_freed_memory()
    assert resident() < before - 20_000_000


def test_a_c_library_that_has_no_such_function(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    return_freed_memory()
