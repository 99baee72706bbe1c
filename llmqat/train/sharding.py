"""FSDP2: parameters, gradients and optimizer states split over the processes, block by block.

Inside the forward of its block a parameter is whole again, and in float32: the grid of training is that of one process,
to the bit. accelerate's own preparation would gather parameters in bfloat16, and find codes with rounded masters.
"""

import copy
import os
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llmqat.errors import LlmqatError
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.patcher import plain_model
from llmqat.nn.dtensor import split_like, whole
from llmqat.processes import process_count
from llmqat.train.optimizers import make_optimizer


def sharding_requested() -> bool:
    """Whether `accelerate launch` asked for FSDP2.

    Raises:
        LlmqatError: if it asked for FSDP 1.
    """
    if process_count() == 1 or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise LlmqatError(
            "FSDP 1 flattens parameters, and scales with weights; set fsdp_version: 2 in the accelerate config, or "
            "pass --fsdp_version 2"
        )
    return True


class ShardedModel:
    """A model split over the processes, in place, until `gather` makes it plain again."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model
        # The plain model without its parameters: what `gather` fills.
        memo: dict[int, object] = {id(p): _on_meta(p) for p in model.parameters()}
        memo |= {id(buffer): buffer for buffer in model.buffers()}
        self.plain = copy.deepcopy(model, memo)
        mesh = init_device_mesh(device.type, (process_count(),))
        names = set(plain_model(model)._no_split_modules or ())
        for module in model.modules():
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh)
        # Split again after each forward: a teacher that swaps parameters before its own must not leave them behind.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)

    def gather(self, values: dict[str, Tensor] | None = None) -> None:
        """Make the model plain again, whole and on the CPU in every process, as it was before training.

        Args:
            values: parameters by name that take other values than the current ones.
        """
        current = dict(self.model.named_parameters())
        filled: dict[int, nn.Parameter] = {}
        for name, empty in self.plain.named_parameters():
            value = whole(current[name].detach())
            filled[id(empty)] = nn.Parameter((values or {}).get(name, value), empty.requires_grad)
        for module in self.plain.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = filled.get(id(parameter), parameter)
        self.plain.cpu()
        self.model.__class__, self.model.__dict__ = self.plain.__class__, self.plain.__dict__


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def prepare_model(
    accelerator: Accelerator,
    model: nn.Module,
    groups: list[dict[str, Any]],
    teacher: FloatCopy | FloatView | None,
    optimizer: str = "adamw",
) -> tuple[nn.Module, torch.optim.Optimizer, list[ShardedModel]]:
    """Model and optimizer for the processes there are: alone, as DDP, or split.

    Args:
        accelerator: of the run.
        model: whole in every process; split in place if FSDP2 was asked for.
        groups: optimizer groups of its parameters.
        teacher: a copy goes to the model's device, and is split like it.
        optimizer: its name, see `make_optimizer`.

    Returns:
        what to call, the optimizer, and what was split.

    Raises:
        LlmqatError: for an 8-bit optimizer under FSDP2: its blocks of state do not follow the split.
    """
    copied = teacher.model if isinstance(teacher, FloatCopy) else None
    if not sharding_requested():
        if copied is not None:
            copied.to(accelerator.device)
        return accelerator.prepare_model(model), make_optimizer(optimizer, groups), []
    if optimizer != "adamw":
        raise LlmqatError(f"--optimizer {optimizer} does not run under FSDP2; use adamw, or DDP (recipes/accelerate)")
    names = {id(p): name for name, p in model.named_parameters()}
    named = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]
    sharded = [ShardedModel(m, accelerator.device) for m in (model, copied) if m is not None]
    parameters = dict(model.named_parameters())
    groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in named]
    return accelerator.prepare_model(model, evaluation_mode=True), make_optimizer(optimizer, groups), sharded


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """State of an optimizer with split tensors put together; every process must call this."""
    state = optimizer.state_dict()
    whole_states = {i: {k: whole(v) for k, v in values.items()} for i, values in state["state"].items()}
    return {**state, "state": whole_states}


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_state` gave, split as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    split = {
        i: {
            k: split_like(v, parameters[i]) if getattr(v, "shape", None) == parameters[i].shape else v
            for k, v in values.items()
        }
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": split})
