"""Run a model whose weights lie in files with one of its blocks in memory at a time, forward and backward."""

from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.compat.torch import in_backward
from llmqat.mapped import is_mapped, release, will_need
from llmqat.models.architectures import blocks_of, check_blocks
from llmqat.nn.linear_like import LINEAR_LAYERS


class BlockStream:
    """Keeps one block of a model on the device that computes, and in memory: the one that runs.

    Before the forward of a block the one that ran before it goes back to where it came from, and reading of the next
    begins: of the one before it in a backward, where gradient checkpointing computes one block after the other again,
    from the last on. The backward of a block holds on to what is on the device.

    Args:
        model: its weights in files; what trains is in memory, and stays on the device.
        device: that computes. Layers on a grid fetch their weights by themselves where no forward does.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device) -> None:
        check_blocks(model)
        self.model, self.device, self.blocks = model, device, list(blocks_of(model))
        self.here: int | None = None
        self.away: list[tuple[nn.Parameter, Tensor]] = []  # those of the block that is here, and their places in files
        for index, block in enumerate(self.blocks):
            # Gradient checkpointing may call the parts of a block alone; those that go onto a grid are replaced.
            for module in (block, *block.children()):
                if not isinstance(module, LINEAR_LAYERS):
                    module.register_forward_pre_hook(partial(self._enter, index))

    def place(self, model: nn.Module) -> nn.Module:
        """`model`, all of it that is not streamed put on the device; again, whenever modules were added to it."""
        streamed = {id(parameter) for index in range(len(self.blocks)) for parameter in self._streamed(index)}
        streamed |= {id(parameter) for parameter, _ in self.away}
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in streamed and tensor.device != self.device:
                tensor.data = tensor.data.to(self.device)
        return model

    def _enter(self, index: int, *_: Any) -> None:
        if index == self.here:
            return
        self._leave()
        self.here = index
        if self.device.type != "cpu":
            for parameter in self._streamed(index):
                self.away.append((parameter, parameter.data))
                parameter.data = parameter.data.to(self.device)
        following = index - 1 if in_backward() else index + 1
        if 0 <= following < len(self.blocks):
            will_need(*self._streamed(following))

    def _leave(self) -> None:
        """Let go of the block that is here."""
        for parameter, place in self.away:
            if parameter.shape == place.shape:  # else it was given another layout since, which stays on the device
                parameter.data = place
        self.away.clear()
        if self.here is not None:
            release(*self._streamed(self.here))

    def _streamed(self, index: int) -> list[nn.Parameter]:
        return [parameter for parameter in self.blocks[index].parameters() if is_mapped(parameter)]
