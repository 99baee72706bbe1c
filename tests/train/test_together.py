import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from llmqat.config import TrainConfig
from llmqat.errors import LlmqatError
from llmqat.nn.dtensor import from_shard, gathered, local_shard, sharded_like
from llmqat.team import ALONE, Team
from llmqat.train.sharding import sharding_requested
from llmqat.train.together import (
    accelerator_for,
    any_of,
    check_agreement,
    close_process_group,
    connect,
    host_means,
    mean,
)
from tests.pretended_device import PRETENDED


def test_alone_nothing_happens(tmp_path):
    assert connect(torch.device("cpu")) == ALONE
    check_agreement(ALONE, 3, tmp_path)
    accelerator = accelerator_for(TrainConfig(precision="fp32"), None)
    assert mean(accelerator, torch.tensor(0.1, requires_grad=True)) == torch.tensor(0.1).item()
    assert host_means(ALONE, 3, 0.5) == [3, 0.5]
    assert [any_of(ALONE, flag) for flag in (True, False)] == [True, False]
    close_process_group()


def test_the_launcher_does_not_change_the_recipe(monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    accelerator = accelerator_for(TrainConfig(precision="fp32", accumulation=3), None)
    assert (accelerator.gradient_accumulation_steps, accelerator.mixed_precision) == (3, "no")


def test_runs_of_one_process_compute_each_in_its_precision():
    for precision, mixed in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        assert accelerator_for(TrainConfig(precision=precision), None).mixed_precision == mixed


def test_a_checkpoint_that_not_all_see(monkeypatch, tmp_path):
    monkeypatch.setattr(Team, "all_of", lambda team, value: [4, 4, None])
    message = "process 2 does not find in .* what process 0 finds; --resume on several machines needs an --output on a"
    with pytest.raises(LlmqatError, match=message):
        check_agreement(Team(0, 3), 4, tmp_path)
    monkeypatch.setattr(Team, "all_of", lambda team, value: [4, 4, 4])
    check_agreement(Team(0, 3), 4, tmp_path)


def test_what_one_host_knows_all_learn(monkeypatch):
    monkeypatch.setattr(Team, "all_of", lambda team, value: [value, (5.0, 1.0), (1.0, 1.5)])
    assert host_means(Team(0, 3), 3.0, 2.0) == [3.0, 1.5]
    for flags in ([False, True], [False, False]):
        monkeypatch.setattr(Team, "all_of", lambda team, value, flags=flags: flags)
        assert any_of(Team(0, 2), False) == any(flags)


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    message = r"training loop does not run under DeepSpeed; launch with recipes/accelerate/fsdp2\.yaml"
    with pytest.raises(LlmqatError, match=message):
        accelerator_for(TrainConfig(), None)


def test_fsdp_has_to_be_its_second_version(monkeypatch):
    assert not sharding_requested()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert not sharding_requested(), "one process has nothing to split"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding_requested()
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(LlmqatError, match="FSDP 1 flattens parameters, and scales with weights; set fsdp_version: 2"):
        sharding_requested()


def test_what_is_not_split_is_whole():
    tensor = nn.Parameter(torch.arange(3.0))
    assert gathered(tensor) is tensor
    assert sharded_like(tensor, tensor) is tensor
    assert from_shard(tensor, tensor) is tensor
    local_shard(tensor).add_(1)
    assert tensor.tolist() == [1, 2, 3]


def test_only_the_process_that_writes_copies(monkeypatch):
    tensor = torch.arange(3.0)
    copied = gathered(tensor, copied=True)
    tensor.add_(1)
    assert copied.tolist() == [0, 1, 2]
    monkeypatch.setenv("RANK", "1")
    assert gathered(tensor, copied=True) is gathered(tensor) is None
    assert gathered(tensor, everywhere=True) is tensor


def test_the_device_of_a_run_stays(pretended):
    """accelerate copies its choice over ours whenever somebody asks for its state."""
    accelerator = accelerator_for(TrainConfig(), None, PRETENDED)
    AcceleratorState()
    with accelerator.autocast():
        assert accelerator.device == PRETENDED
    assert accelerator_for(TrainConfig(), None, torch.device("cpu")).device == torch.device("cpu")
