"""Where a kernel is launched: on the device of its tensors, which need not be the current one."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[None]:
    """Make `device` the current one inside the ``with``; tensors of a CPU, for the interpreter, have none."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = torch.accelerator.device_index(device.index)
    return context
