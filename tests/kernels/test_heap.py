"""Freed memory is kept while kernels of training run, and given back afterwards."""

import psutil
import pytest
import torch

from llmqat.kernels import heap
from llmqat.kernels.heap import kept_memory

MIB = 1 << 20


class Rules:
    """A C library that remembers the options that were set."""

    def __init__(self) -> None:
        self.options: list[tuple[int, int]] = []

    def mallopt(self, option: int, value: int) -> int:
        self.options.append((option, value))
        return 1


@pytest.fixture
def rules(monkeypatch):
    found = Rules()
    monkeypatch.setattr(heap, "_glibc", lambda: found)
    return found


def test_the_outermost_sets_the_rules_and_restores_them(rules):
    with kept_memory():
        with kept_memory():
            assert rules.options == list(heap.KEPT.items())
        assert len(rules.options) == len(heap.KEPT)
    assert rules.options[len(heap.KEPT) :] == list(heap.USUAL.items())


def test_an_error_restores_them_too(rules):
    with pytest.raises(ValueError, match="inside"), kept_memory():
        raise ValueError("inside")
    assert rules.options[len(heap.KEPT) :] == list(heap.USUAL.items())


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(heap, "_glibc", lambda: None)
    with kept_memory():
        assert torch.ones(3).sum() == 3


@pytest.mark.skipif(heap._glibc() is None, reason="the C library is not glibc")
def test_memory_stays_inside_and_goes_at_the_end():
    process = psutil.Process()
    with kept_memory():
        before = process.memory_info().rss
        tensor = torch.ones(256 * MIB // 4)
        del tensor
        assert process.memory_info().rss - before > 200 * MIB
    assert process.memory_info().rss - before < 100 * MIB
