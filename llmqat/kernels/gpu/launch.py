"""Where a kernel is launched: on the device of its tensors, which need not be the current one."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[None]:
    """Make `device` the current one inside the ``with``; tensors of a CPU, for the interpreter, have none."""
    if device.type == "cpu":
        return nullcontext()
    context: AbstractContextManager[None] = torch.accelerator.device_index(device.index)
    return context


def registers(count: int, device: torch.device) -> dict[str, int]:
    """The option for `count` registers a thread; none for the compilers of AMD and Intel, which do not know it."""
    return {} if device.type == "xpu" or torch.version.hip is not None else {"maxnreg": count}
