"""Tensors in files: equal to what was written, out of memory once they are released, gone with the last of them."""

import gc
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmqat import mapped
from llmqat.errors import LlmqatError
from llmqat.mapped import Disk, is_mapped, mapped_tensors, release, will_need

LARGE = 4_000_000  # bytes that show in the memory of the process


def resident() -> int:
    """Bytes of files in the memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssFile"))


@pytest.fixture
def values():
    return {
        "wide": torch.randn(3, 5),
        "half": torch.randn(7).to(torch.bfloat16),
        "codes": torch.arange(6, dtype=torch.int8).view(2, 3),
        "none": torch.empty(0, 4),
    }


def test_tensors_of_a_file(tmp_path, values):
    save_file(values, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = mapped_tensors(tmp_path / "a.safetensors")
    assert found.keys() == values.keys()
    for name, value in values.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)
        assert is_mapped(found[name]) == (value.numel() > 0)
    assert is_mapped(torch.nn.Parameter(found["wide"], requires_grad=False)[1:].T)
    assert not is_mapped(values["wide"])


def test_a_dtype_that_torch_cannot_compute_with(tmp_path):
    save_file({"a": torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(LlmqatError, match=r"holds tensors of F8_E4M3; write the model again in F64, F32, F16"):
        mapped_tensors(tmp_path / "a.safetensors")


def test_the_disk_holds_what_is_put(tmp_path, values, monkeypatch):
    """Also in several segments, one of them made for a tensor that is larger; and under no name."""
    monkeypatch.setattr(mapped, "SEGMENT_BYTES", 8192)
    disk = Disk(tmp_path)
    values |= {"large": torch.randn(100, 100), "transposed": torch.randn(4, 6).T}
    found = {name: disk.put(value) for name, value in values.items()}
    assert all(torch.equal(found[name], value) for name, value in values.items())
    assert all(is_mapped(tensor) for tensor in found.values() if tensor.numel())
    assert disk.put(found["large"]) is found["large"]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(tmp_path, monkeypatch):
    disk = Disk(tmp_path)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk.file, "write", full, raising=False)
    with pytest.raises(LlmqatError, match=r"cannot write to .* 3 MB: No space left on device; free some space, or"):
        disk.put(torch.zeros(1 << 20, dtype=torch.float32)[: 3 << 18])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_released_pages_leave_memory_and_come_back(tmp_path):
    tensor = Disk(tmp_path).put(torch.arange(LARGE // 8))
    own = torch.arange(LARGE // 8)
    total = tensor.sum()
    full = resident()
    release(tensor, own, None)
    assert resident() <= full - LARGE // 2
    will_need(tensor, own, None)
    assert tensor.sum() == total == own.sum()


def test_a_map_goes_with_its_last_tensor(tmp_path):
    disk, before = Disk(tmp_path), len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    tensor = disk.put(torch.zeros(10))
    address = tensor.data_ptr()
    part = tensor[2:]
    del tensor, disk
    gc.collect()
    assert address in mapped._MAPS
    del part
    gc.collect()
    assert address not in mapped._MAPS
    assert before is None or len(os.listdir("/proc/self/fd")) <= before
