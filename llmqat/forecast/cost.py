"""The cost of a piece of a run: operations and bytes, found for two and three blocks, and continued to all of them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple, Self

import torch
from transformers import PreTrainedModel

from llmqat.compat.torch import fake_tensors
from llmqat.config import Resolved
from llmqat.forecast.shapes import (
    Shapes,
    block_count,
    expert_count,
    fill_with_fakes,
    has_like_blocks,
    prepared,
    shortened,
)
from llmqat.metrics.live_bytes import LiveBytes
from llmqat.metrics.perplexity import BATCH_TOKENS
from llmqat.models.coverage import CoverageReport
from llmqat.models.output_head import OutputHead
from llmqat.quant.grid import without_values
from llmqat.train.objective import Objective

ADAM_BYTES = {"adamw": 8, "adamw8bit": 2, "paged_adamw8bit": 2}  # of both moments, for each parameter that trains


class Cost(NamedTuple):
    """Operations and memory of one piece of work.

    Attributes:
        flops: floating-point operations of matrix products and attention.
        held: bytes of the models, which are there before and after.
        peak: bytes at the worst moment, `held` included.
    """

    flops: float
    held: float
    peak: float

    def continued(self, longer: Self, times: int) -> "Cost":
        """The cost after `times` more steps of the difference between this one and `longer`."""
        return Cost(*(a + times * (b - a) for a, b in zip(self, longer, strict=True)))


class Stage(NamedTuple):
    """One stage of a run.

    Attributes:
        name: of the stage.
        flops: its floating-point operations.
        dtype: in which most of them run.
        bytes: its peak of memory; in a `Forecast` with the process itself.
    """

    name: str
    flops: float
    dtype: torch.dtype
    bytes: float


Work = Callable[[Shapes, Resolved], None]


def cost_of(
    work: Work, model: PreTrainedModel, recipe: Resolved, coverage: CoverageReport, stored: torch.dtype
) -> Cost:
    """The cost of `work` on a model, on the meta device, that the recipe prepares."""

    def of_first(blocks: int | None, experts: int | None) -> Cost:
        shapes = prepared(shortened(model, blocks, experts), recipe, coverage, stored)
        with fake_tensors():
            fill_with_fakes(shapes)
            live = LiveBytes(shapes.tensors())
            held = live.current
            with live.counting(), without_values():
                work(shapes, recipe)
        return Cost(live.flops, held, live.peak)

    def of_blocks(experts: int | None) -> Cost:  # the first block may do more than the others
        count = block_count(model) if has_like_blocks(model) else None
        return _of_all(lambda blocks: of_first(blocks, experts), count)

    return _of_all(of_blocks, expert_count(model))


def _of_all(of_first: Callable[[int | None], Cost], count: int | None) -> Cost:
    """The cost of `count` blocks or experts, alike but for the first: found for two and three of them."""
    if count is None or count < 4:
        return of_first(None)
    return of_first(2).continued(of_first(3), count - 2)


def training_step(shapes: Shapes, recipe: Resolved) -> None:
    """Forward and backward of one batch beside the optimizer's states, with the teacher if there is one."""
    model, config = shapes.model, recipe.train
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    objective = Objective(model, config, shapes.reference if config.loss == "kd" else None)
    for head in (objective.head, objective.teacher_head):
        trust(head)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    moments = [torch.empty(ADAM_BYTES[config.optimizer] * p.numel(), dtype=torch.uint8) for p in trained]
    ids = torch.zeros(config.batch_size, recipe.data.length, dtype=torch.int64)
    objective.loss(model, ids, None, autocast_of(recipe)).backward()
    del moments


@torch.no_grad()
def scored_batch(shapes: Shapes, recipe: Resolved) -> None:
    """Forward of one batch of an evaluation, up to the output head, and the head on all its tokens."""
    model = shapes.model.eval()
    head = OutputHead(model)
    trust(head)
    windows = max(1, BATCH_TOKENS // recipe.eval.window)
    ids = torch.zeros(windows, recipe.eval.window, dtype=torch.int64)
    below = head.below(model, input_ids=ids, use_cache=False)
    hidden = below.hidden.flatten(0, 1)
    for chunk in below.chunks(len(hidden)):
        below.logits(hidden[chunk])


def autocast_of(recipe: Resolved) -> Callable[[], AbstractContextManager[None]]:
    """Opens the context in which training computes."""
    return partial(torch.autocast, "cpu", torch.bfloat16) if recipe.train.precision == "bf16" else nullcontext


def trust(head: OutputHead | None) -> None:
    """Take it for granted that the head runs apart: fake logits cannot be compared."""
    if head is not None:
        head.compared = True
