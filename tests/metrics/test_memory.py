from pathlib import Path

import pytest
import torch

from llmqat.metrics import memory
from llmqat.metrics.memory import peak_memory
from tests.pretended_device import PRETENDED

MIB = 1 << 20


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def touch(mib):
    return torch.ones(mib * MIB // 4)


def test_the_peak_inside_counts():
    before = resident()
    with peak_memory() as peak:
        del_me = touch(96)
        del del_me
    assert peak.bytes >= before + 90 * MIB
    with peak_memory() as second:
        pass
    assert second.bytes <= peak.bytes - 60 * MIB  # an earlier peak is not this stretch's


def test_an_error_inside_is_measured_too():
    with pytest.raises(RuntimeError, match="inside"), peak_memory() as peak:
        raise RuntimeError("inside")
    assert peak.bytes > 0


def test_without_a_counter_to_reset(monkeypatch, tmp_path):
    """The peak since the start: at least what the process holds."""
    monkeypatch.setattr(memory, "_CLEAR", tmp_path)  # writing to a directory fails
    with peak_memory() as peak:
        pass
    assert peak.bytes >= 0.9 * resident()


def test_without_proc(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_STATUS", tmp_path / "none")
    with peak_memory() as peak:
        pass
    assert peak.bytes >= 0.9 * resident()


def test_memory_of_a_device_counts_beside_that_of_the_process(pretended, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "max_memory_allocated", lambda device: 7 * MIB)
    with peak_memory(PRETENDED) as peak:
        pass
    assert (peak.bytes > 0, peak.device_bytes) == (True, 7 * MIB)
    with peak_memory() as peak:
        pass
    assert peak.device_bytes is None
