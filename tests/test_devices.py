import os

import pytest
import torch

from llmqat import devices
from llmqat.devices import core_count, devices_here, find_device, use_share_of_cores
from llmqat.errors import LlmqatError


def test_a_machine_without_accelerator():
    assert devices_here() == ["cpu"]
    assert find_device() == find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("asked", ["cuda", "cuda:0", "tpu", "mps:x", "cpu:1", ":"])
def test_a_device_that_is_not_there(asked):
    with pytest.raises(LlmqatError, match=f"no device '{asked}'; torch sees cpu: give one of them, or auto"):
        find_device(asked)


@pytest.fixture
def three(pretended, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 3)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 1)


@pytest.mark.parametrize(("asked", "found"), [("auto", "xpu:1"), ("xpu", "xpu:1"), ("xpu:2", "xpu:2"), ("cpu", "cpu")])
def test_one_of_several_devices(three, asked, found):
    assert find_device(asked) == torch.device(found)


def test_a_device_beyond_the_last(three):
    with pytest.raises(LlmqatError, match="no device 'xpu:3'; torch sees cpu, xpu:0, xpu:1, xpu:2: give"):
        find_device("xpu:3")


def test_each_process_gets_its_own(three, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert find_device("auto") == find_device("xpu") == torch.device("xpu:2")
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(LlmqatError, match="xpu:1 is one device, and there are 8 processes; give xpu"):
        find_device("xpu:1")


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}, 3),
        ({"OMP_NUM_THREADS": "1", "OMPI_COMM_WORLD_SIZE": "2"}, 13),
        ({"OMP_NUM_THREADS": "4", "WORLD_SIZE": "8"}, None),  # somebody's choice
        ({"OMP_NUM_THREADS": "1"}, None),
        ({"OMP_NUM_THREADS": "1", "WORLD_SIZE": "26"}, None),
    ],
)
def test_each_process_computes_on_its_share_of_the_cores(monkeypatch, capsys, environment, threads):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    chosen = []
    monkeypatch.setattr(devices, "core_count", lambda: 26)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    use_share_of_cores()
    assert chosen == ([] if threads is None else [threads])
    said = f"share 26 cores, and each computes on {threads} threads; give OMP_NUM_THREADS=2 or more"
    assert (said in capsys.readouterr().err) == (threads is not None)


def test_cores_are_those_of_this_process():
    assert 1 <= core_count() <= os.cpu_count()
