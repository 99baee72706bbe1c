"""A model of fake tensors, prepared as a run prepares it: what runs in it costs what it would, and takes no memory."""

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.compat.torch import members_of
from llmqat.config import Resolved
from llmqat.errors import LlmqatError
from llmqat.models.architectures import blocks_of, known_architecture
from llmqat.models.coverage import CoverageReport
from llmqat.models.experts import fused_experts, split_experts
from llmqat.models.float_view import FloatView, copy_of_float
from llmqat.models.patcher import put_on_grid, quantized_layers
from llmqat.models.widening import compute_in_float32
from llmqat.nn.experts import SplitExperts
from llmqat.nn.kv_cache import quantize_kv
from llmqat.quant.grid import Compensation
from llmqat.train.modes import add_lora, select_trainable
from llmqat.train.objective import Teacher


class Shapes(NamedTuple):
    """A prepared model and its float reference, both without values.

    Attributes:
        model: prepared, and marked for what trains.
        reference: the float model it is compared with.
    """

    model: PreTrainedModel | PeftModel
    reference: Teacher

    def tensors(self) -> Iterable[Tensor]:
        """Parameters and buffers of both."""
        for model in (self.model, self.reference.model):
            yield from model.parameters()
            yield from model.buffers()


def block_count(model: PreTrainedModel) -> int | None:
    """Blocks of a model; None where they cannot be found."""
    try:
        return len(blocks_of(model))
    except LlmqatError:
        return None


def has_like_blocks(model: PreTrainedModel) -> bool:
    """Whether a model is known to be as good as a shorter one, each block but the first doing as much as any other."""
    return known_architecture(model) is not None


def expert_count(model: PreTrainedModel) -> int | None:
    """Experts of each block that has some; None for none, or where blocks have different numbers of them."""
    counts = {len(model.get_parameter(f"{name}.down_proj")) for name in fused_experts(model)}
    return counts.pop() if len(counts) == 1 else None


def shortened(model: PreTrainedModel, blocks: int | None, experts: int | None) -> PreTrainedModel:
    """A copy of `model`, which has no weights, with its first `blocks`, and the first `experts` of each; None for all.
    Experts are split."""
    short = copy.deepcopy(model)
    if blocks is not None:
        del blocks_of(short)[blocks:]
    split_experts(short)
    for module in short.modules():
        if isinstance(module, SplitExperts) and experts is not None:
            del module[experts:]
    return short


def prepared(model: PreTrainedModel, recipe: Resolved, coverage: CoverageReport, stored: torch.dtype) -> Shapes:
    """Prepare `model`, on the meta device, for what the recipe trains, as a run does."""
    quant, train = recipe.quant, recipe.train
    model.requires_grad_(False)
    names = {name for name, _ in model.named_modules()}
    put_on_grid(model, [layer for layer in coverage.quantized if layer.name in names], stored, quant.clip_mask)
    if quant.kv_bits is not None:
        quantize_kv(model, quant.kv_bits)
    compute_in_float32(model, stored)
    float_copy = copy_of_float(model) if train.mode == "full" else None
    if recipe.init.by_blocks and float_copy is None:
        for on_grid in quantized_layers(model):
            on_grid.layer.compensation = Compensation(
                torch.empty_like(on_grid.layer.weight, dtype=torch.int8),
                torch.empty_like(on_grid.layer.scale, dtype=torch.bfloat16),
            )
    marked = add_lora(model, train.lora_r, alpha=1.0) if train.mode == "lora" else model
    select_trainable(marked, train.mode, train.lr_scale > 0, train.lr_float > 0)
    return Shapes(marked, float_copy or FloatView(marked))


def fill_with_fakes(shapes: Shapes) -> None:
    """Put tensors on the CPU, shared as they were, in the place of those on the meta device; inside `fake_tensors`."""
    filled: dict[int, tuple[Tensor, Tensor]] = {}  # old ones too: an id may come again once its tensor is gone
    for module in (*shapes.model.modules(), *shapes.reference.model.modules()):
        _, parameters, buffers = members_of(module)
        for tensors in (parameters, buffers):
            for name, old in tensors.items():
                if old is not None:
                    tensors[name] = filled.setdefault(id(old), (old, _fake(old)))[1]


def _fake(tensor: Tensor) -> Tensor:
    new = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
    return nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
