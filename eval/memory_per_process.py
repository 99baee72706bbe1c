"""Memory and traffic of a training step in each of two processes, under DDP and under FSDP2.

    python eval/memory_per_process.py --output eval/results/memory_per_process.json

The model of `training_cost.py` (110 M parameters), 4-bit, distillation from the float model, bfloat16 autocast, two
steps of 2 x 1 x 64 tokens on the CPU, over gloo. All of it is about the second step: resident bytes above those of the
process before the model was made, at their peak and at its end, and bytes that FSDP2 gathers and scatters.
"""

import argparse
import json
import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from training_cost import SHAPE, finetune_random_text

import llmqat

LAUNCHERS = {"ddp": {}, "fsdp2": {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}}
COUNT, LENGTH, STEPS = 2, 64, 2
COLLECTIVES = {"all_gather_single": "gathered", "reduce_scatter_single": "scattered"}


def resident_bytes() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class SecondStep:
    """Watches the step between the first and the second move of the optimizer."""

    def __init__(self, before: int) -> None:
        self.before, self.found, self.peak = before, dict.fromkeys(("gathered", "scattered"), 0), llmqat.peak_memory()
        self.moves = 0
        for name, kind in COLLECTIVES.items():
            setattr(torch.distributed, name, self.counted(getattr(torch.distributed, name), kind))

    def counted(self, collective: Any, kind: str) -> Any:
        """The collective, its larger tensor counted."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.moves == 1:
                self.found[kind] += max(a.nbytes for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor))
            return collective(*args, **kwargs)

        return call

    def moved(self, *_: Any) -> None:
        """Called after each move of the optimizer."""
        self.moves += 1
        if self.moves == 1:
            self.entered = self.peak.__enter__()
        if self.moves == 2:
            self.peak.__exit__(None, None, None)
            self.found |= {"peak": self.entered.bytes - self.before, "after": resident_bytes() - self.before}


def member(launcher: str, mode: str, rank: int, port: int, queue: Any) -> None:
    """One of the processes."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": COUNT, "LOCAL_WORLD_SIZE": COUNT, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in own.items()} | LAUNCHERS[launcher]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    second = SecondStep(resident_bytes())
    register_optimizer_step_post_hook(second.moved)
    finetune_random_text(mode, (COUNT * STEPS, LENGTH), COUNT, max_steps=STEPS, batch_size=1)
    queue.put((rank, second.found))


def measure(launcher: str, mode: str) -> list[dict[str, int]]:
    """What each process found."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    processes = [context.Process(target=member, args=(launcher, mode, rank, port, queue)) for rank in range(COUNT)]
    for process in processes:
        process.start()
    found = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(COUNT)]


def main() -> None:
    """Measure, print a line per process, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("eval/results/memory_per_process.json"))
    parser.add_argument("--launcher", choices=LAUNCHERS, nargs="+", default=list(LAUNCHERS))
    args = parser.parse_args()
    rows = {}
    for mode in ("full", "lora"):
        for launcher in args.launcher:
            rows[f"{mode}, {launcher}"] = measure(launcher, mode)
            for rank, found in enumerate(rows[f"{mode}, {launcher}"]):
                figures = ", ".join(f"{name} {value / 1e6:,.0f} MB" for name, value in found.items())
                print(f"{mode}, {launcher}, process {rank}: {figures}", flush=True)
    result = {"environment": llmqat.environment(), "shape": SHAPE, "processes": COUNT, "length": LENGTH}
    args.output.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
