"""FSDP2: parameters, gradients and optimizer states sharded over the processes, block by block.

A layer on the grid keeps the rows of its process, quantizes those, and gathers ``W_hat`` (see `RowShard`). Every other
parameter is gathered inside the forward of its block, in its own dtype or, for a teacher, in that of autocast if that
changes no bit: the grid of training is that of one process. accelerate's own preparation would gather parameters in
bfloat16, and find codes with rounded masters.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers.modeling_layers import GradientCheckpointingLayer

from llmqat.compat.torch import forget_sharded
from llmqat.errors import LlmqatError
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.nn.dtensor import divided, gathered, sharded_like
from llmqat.nn.experts import SplitExperts
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.processes import process_count
from llmqat.quant.affine import holds_exactly
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
    """A model that is sharded over the processes, in place, until `gather` undoes it."""

    def __init__(self, model: nn.Module, device: torch.device, autocast: torch.dtype | None = None) -> None:
        """Shard `model` on `device`; autocast, where it is on, computes in the dtype `autocast`."""
        self.model, self.device = model, device
        # The model as it was, without its parameters: `gather` fills it.
        memo: dict[int, object] = {id(p): _on_meta(p) for p in model.parameters()}
        memo |= {id(buffer): buffer for buffer in model.buffers()}
        self.unsharded = copy.deepcopy(model, memo)
        mesh = init_device_mesh(device.type, (process_count(),))
        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        by_rows = {parameter for block in blocks for parameter in divide_rows(block, mesh)}
        for block in blocks:
            fully_shard(block, mesh=mesh, ignored_params=by_rows, mp_policy=gathering_of(block, autocast))
        # Sharded again after each forward: a teacher that swaps parameters before its own must not leave them behind.
        fully_shard(model, mesh=mesh, reshard_after_forward=True, ignored_params=by_rows)

    def gather(self, everywhere: bool) -> None:
        """Put the model together again, on its device and with the modules it had before training.

        Args:
            everywhere: in every process; otherwise in the first alone, and the others are left with a model on meta.
        """
        current, filled = dict(self.model.named_parameters()), {}
        for name, empty in self.unsharded.named_parameters():
            whole = gathered(current[name].detach(), everywhere=everywhere)
            if whole is not None:
                filled[id(empty)] = nn.Parameter(whole, empty.requires_grad)
        for module in self.unsharded.modules():
            for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
                setattr(module, name, filled.get(id(parameter), parameter))
        self.model.__class__, self.model.__dict__ = self.unsharded.__class__, self.unsharded.__dict__
        forget_sharded(self.model)
        if filled:  # tensor by tensor on the CPU, beside the shards
            self.model.to(self.device)


def gathering_of(block: nn.Module, autocast: torch.dtype | None) -> MixedPrecisionPolicy:
    """In which dtype the parameters of a block are gathered: that of autocast for a teacher, if no bit depends on it.

    Autocast casts weights of linear layers anyway. All others must be exact in the dtype, and none may train.
    """
    linear = {p for module in block.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    if autocast is None or any(p.requires_grad for p in block.parameters()):
        return MixedPrecisionPolicy()
    if all(p in linear or holds_exactly(autocast, p) for p in block.parameters()):
        return MixedPrecisionPolicy(param_dtype=autocast, cast_forward_inputs=False)
    return MixedPrecisionPolicy()


def divide_rows(block: nn.Module, mesh: DeviceMesh) -> Iterator[nn.Parameter]:
    """Leave each process its rows of the layers of `block` that are on the grid; yields the parameters with the rows.

    Every process has to run such a layer as often as the others: experts, which see their own tokens or none, stay as
    they are, and so do layers whose grid is switched off.
    """
    experts = {layer for module in block.modules() if isinstance(module, SplitExperts) for layer in module.modules()}
    for layer in block.modules():
        if isinstance(layer, FakeQuantLinear) and layer.enabled and layer not in experts:
            for name, parameter in layer.row_tensors.items():
                own = divided(parameter, mesh)
                setattr(layer, name, own)
                yield own


def _on_meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)


def prepare_model(
    accelerator: Accelerator,
    model: nn.Module,
    groups: list[dict[str, Any]],
    teacher: FloatCopy | FloatView | None,
    optimizer: str = "adamw",
) -> tuple[nn.Module, torch.optim.Optimizer, list[ShardedModel]]:
    """Model and optimizer for the processes there are: one alone, DDP, or FSDP2.

    Args:
        accelerator: of the run.
        model: the full model in every process; sharded in place if FSDP2 was asked for.
        groups: optimizer groups of its parameters.
        teacher: a copy goes to the model's device, and is sharded like it.
        optimizer: its name, see `make_optimizer`.

    Returns:
        the model to call, the optimizer, and the models that were sharded.

    Raises:
        LlmqatError: for an 8-bit optimizer under FSDP2. Its operators refuse a `DTensor`; on the shards themselves the
            scales of its blocks would depend on the number of processes, and with them the state that is saved.
    """
    copied = teacher.model if isinstance(teacher, FloatCopy) else None
    if not sharding_requested():
        if copied is not None:
            copied.to(accelerator.device)
        # It is where it computes already, and weights that are streamed to the device are to stay where they are.
        return accelerator.prepare_model(model, device_placement=False), make_optimizer(optimizer, groups), []
    if optimizer != "adamw":
        raise LlmqatError(
            f"--optimizer {optimizer} does not run under FSDP2: bitsandbytes updates whole tensors, and its blocks of "
            "256 values cross the rows of two processes, so that no other number of them could resume; use adamw, or "
            "DDP (recipes/accelerate)"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    groups_by_name = [{**group, "params": [names[id(p)] for p in group["params"]]} for group in groups]
    autocast = torch.bfloat16 if accelerator.mixed_precision == "bf16" else None
    sharded = [ShardedModel(m, accelerator.device, autocast) for m in (model, copied) if m is not None]
    parameters = dict(model.named_parameters())
    groups = [{**group, "params": [parameters[name] for name in group["params"]]} for group in groups_by_name]
    return accelerator.prepare_model(model, evaluation_mode=True), make_optimizer(optimizer, groups), sharded


def load_gathered_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of an optimizer, its tensors whole, sharded as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        i: {
            k: sharded_like(v, parameters[i]) if getattr(v, "shape", None) == parameters[i].shape else v
            for k, v in values.items()
        }
        for i, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})
