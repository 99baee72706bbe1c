"""Calibrate blocks that do not run one after the other: a loop, two lists that take turns, something in between.

What such a block reads depends on more than the block before it. So the whole model runs for each of them, on the
already quantized ones, and a layer's Hessian is summed over all its calls. That takes a forward of the model for every
block, where a walk takes a few in all.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.algorithms.blocks import BlockInputs, check_batches
from llmqat.algorithms.stand_ins import StandIns
from llmqat.team import ALONE, Team


@dataclass
class WholeRuns(BlockInputs):
    """Token ids as the inputs of any block: to run it is to run the whole model.

    Attributes:
        model: that runs.
    """

    model: nn.Module = field(default_factory=nn.Module)
    in_a_row = False

    @classmethod
    def of(cls, model: nn.Module, batches: list[Tensor], team: Team = ALONE) -> "WholeRuns":
        """The share that one process of a `team` has of `batches`: token ids ``(batch, length)``, all of one shape.

        Raises:
            LlmqatError: if there are none, or their shapes differ.
        """
        check_batches(batches)
        return cls(team.share(batches) or batches[:1], [], len(batches), team, model=model)

    @property
    def tokens(self) -> int:
        """Calibration tokens of all processes."""
        return self.count * self.hidden[0].numel()

    def outputs(self, block: nn.Module, batch: int, stand_ins: StandIns | None = None) -> tuple[Any, ...]:
        """The return value of the model for one batch, in whatever form."""
        ids = self.hidden[batch].to(next(self.model.parameters()).device)
        return (self.model(input_ids=ids, use_cache=False),)

    @torch.no_grad()
    def advance(self, block: nn.Module, stand_ins: StandIns | None = None) -> None:
        """Nothing: the next block's runs are of the whole model, too."""
