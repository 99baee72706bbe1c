"""The device on which a run computes: what was asked for, if this machine has it; and the cores of its CPU."""

import os

import torch

from llmqat.errors import LlmqatError
from llmqat.processes import local_count, local_index, process_count
from llmqat.progress import log


def devices_here() -> list[str]:
    """Names of the devices of this machine: the CPU, then each accelerator that torch sees."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    count = 0 if accelerator is None else torch.accelerator.device_count()
    return ["cpu", *(f"{accelerator.type}:{index}" for index in range(count) if accelerator)]


def find_device(asked: str = "auto") -> torch.device:
    """The device that a name stands for; auto is the accelerator that torch sees, else the CPU.

    A name without a number is torch's current device; of several processes each gets its own, as accelerate does.

    Raises:
        LlmqatError: if this machine has no such device, or several processes are to share one.
    """
    here = devices_here()
    name = here[-1].partition(":")[0] if asked == "auto" else asked
    count = sum(other.startswith(f"{name}:") for other in here)
    if count:
        index = torch.accelerator.current_device_index() if process_count() == 1 else local_index() % count
        return torch.device(name, index)
    if name not in here:
        raise LlmqatError(f"there is no device {asked!r}; torch sees {', '.join(here)}: give one of them, or auto")
    if name != "cpu" and process_count() > 1:
        raise LlmqatError(
            f"{asked} is one device, and there are {process_count()} processes; give {name.partition(':')[0]}, of "
            "which each process gets its own"
        )
    return torch.device(name)


def use_share_of_cores() -> None:
    """Let this process compute on its share of the machine's cores, where a launcher keeps it to one thread.

    torchrun and accelerate set OMP_NUM_THREADS=1 wherever they start several processes, for the sake of GPUs.
    """
    processes, cores = local_count(), core_count()
    share = cores // max(1, processes)
    if processes > 1 and share > 1 and os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(share)
        log(
            f"OMP_NUM_THREADS=1, as launchers set it: {processes} processes share {cores} cores, and each computes on "
            f"{share} threads; give OMP_NUM_THREADS=2 or more for another number"
        )


def core_count() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
