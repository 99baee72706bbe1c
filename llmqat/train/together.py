"""Several processes as one, on accelerate: waiting, agreeing, averaging. A single process passes through."""

import os
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import GradientAccumulationPlugin, broadcast
from torch import nn

from llmqat.algorithms.activation_ranges import static_layers
from llmqat.compat.accelerate import forget_accelerator
from llmqat.config import TrainConfig
from llmqat.errors import LlmqatError
from llmqat.processes import process_count
from llmqat.team import Team, connection, whole_team

CPU = torch.device("cpu")


def connect(device: torch.device) -> Team:
    """Connect the processes, each of which computes on a `device` of its own; returns once all have come this far."""
    if process_count() > 1:
        PartialState(cpu=device.type == "cpu")
    team = whole_team()
    team.wait()
    return team


def close_process_group() -> None:
    """Close the connection between the processes, if there is one; the last thing a process does."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        PartialState().destroy_process_group()
        connection.cache_clear()


def check_agreement(team: Team, value: Any, directory: Path) -> None:
    """Every process of `team` must have read the same from `directory`.

    Raises:
        LlmqatError: if one did not.
    """
    values = team.all_of(value)
    others = [index for index, other in enumerate(values) if other != values[0]]
    if others:
        raise LlmqatError(
            f"process {others[0]} does not find in {directory} what process 0 finds; --resume on several machines "
            "needs an --output on a file system that all of them share"
        )


def accelerator_for(config: TrainConfig, directory: Path | None, device: torch.device = CPU) -> Accelerator:
    """The accelerator of a training run on `device`; the processes are accelerate's choice, precision is the recipe's.

    Raises:
        LlmqatError: under DeepSpeed, whose engine keeps optimizer and masters to itself.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        raise LlmqatError(
            "llmqat's training loop does not run under DeepSpeed; launch with recipes/accelerate/fsdp2.yaml, or train "
            "the prepared model by transformers.Trainer (docs/distributed.md)"
        )
    precision = "bf16" if config.precision == "bf16" else "no"
    if is_initialized() and (AcceleratorState().mixed_precision, AcceleratorState().device) != (precision, device):
        forget_accelerator()
    accelerator = Accelerator(
        mixed_precision=precision,
        cpu=device.type == "cpu",
        # The plugin, because an environment variable would win over the plain argument.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulation),
        log_with=config.tracker,
        project_dir=None if directory is None else str(directory),
        # Buffers are the grid that all processes start with; sending them again in each forward would cost as much as
        # the weights.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
    )
    if device.type != "cpu":
        torch.accelerator.set_device_index(device.index)  # libraries below launch their kernels there
    if accelerator.num_processes == 1:  # of several, accelerate has given each its own
        PartialState().device = accelerator.state.device = device  # the second is a copy of the first, now and then
    return accelerator


def mean(accelerator: Accelerator, value: float | torch.Tensor) -> float:
    """Mean over processes, the same number in each; the host waits for the device."""
    if accelerator.num_processes == 1:
        return float(value)
    own = torch.as_tensor(value, dtype=torch.float64, device=accelerator.device).detach()
    return accelerator.reduce(own, "mean").item()  # type: ignore[union-attr]


def host_means(team: Team, *values: float) -> list[float]:
    """Means over processes of numbers that the host has, the same in each; no device is waited for."""
    return [fmean(of_all) for of_all in zip(*team.all_of(values), strict=True)]


def same_ranges(accelerator: Accelerator, model: nn.Module) -> None:
    """Give every process the ranges of static activations that the first one followed: one grid for all."""
    if accelerator.num_processes > 1:
        for layer in static_layers(model):
            broadcast([layer.act_state, layer.act_scale])


def any_of(team: Team, flag: bool) -> bool:
    """Whether the flag is set in any process; no device is waited for."""
    return any(team.all_of(flag))
