"""Two processes of a test that compute together, over gloo."""

import multiprocessing
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch

SECONDS = 60


def _connected(work: Callable[[int], None], rank: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", store, timedelta(seconds=SECONDS), world_size=2, rank=rank)
    work(rank)
    torch.distributed.destroy_process_group()


def run_in_two(work: Callable[[int], None], folder: Path) -> None:
    """Run ``work(rank)``, a function of a module, in two connected processes; both must come to its end."""
    context = multiprocessing.get_context("forkserver")
    members = [context.Process(target=_connected, args=(work, rank, folder)) for rank in (0, 1)]
    for process in members:
        process.start()
    for process in members:
        process.join(SECONDS)
        process.kill()
    assert [process.exitcode for process in members] == [0, 0]
