"""Peak memory of `llmqat.finetune` by mode, with and without gradient checkpointing.

    python eval/training_memory.py --output eval/results/training_memory.json

Random-weight Llama of 110 M parameters (768 wide, 12 layers), 4-bit, distillation from the float model, bfloat16
autocast, two steps of 4 x 256 tokens. Each variant runs in a process of its own; bytes are resident ones above those of
the process before the model was made. "full" holds a second copy of the float model, its teacher; the others run it
inside the prepared one.
"""

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from training_cost import BATCH, LENGTH, SHAPE, finetune_random_text

import llmqat

VARIANTS = [(mode, checkpointing) for mode in ("full", "lora", "scales") for checkpointing in (False, True)]
STEPS = 2


def peak_bytes(mode: str, checkpointing: bool, threads: int, queue: Any) -> None:
    """Peak resident bytes and seconds of one variant."""
    torch.set_num_threads(threads)
    with llmqat.peak_memory() as before:
        pass
    started = time.monotonic()
    with llmqat.peak_memory() as peak:
        options = {"max_steps": STEPS, "batch_size": BATCH, "gradient_checkpointing": checkpointing}
        finetune_random_text(mode, (STEPS * BATCH, LENGTH), 1, **options)
    queue.put((peak.bytes - before.bytes, time.monotonic() - started))


def measure(threads: int) -> dict[str, dict[str, float]]:
    """Every variant in a fresh process."""
    context = multiprocessing.get_context("spawn")
    rows = {}
    for mode, checkpointing in VARIANTS:
        queue = context.Queue()
        process = context.Process(target=peak_bytes, args=(mode, checkpointing, threads, queue))
        process.start()
        peak, seconds = queue.get()
        process.join()
        name = f"{mode}{', gradient checkpointing' if checkpointing else ''}"
        rows[name] = {"peak_bytes": peak, "seconds": seconds}
        print(f"{name:<32} {peak / 1e9:6.2f} GB {seconds:8.1f} s", flush=True)
    return rows


def main() -> None:
    """Measure, print a line per variant, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--output", type=Path, default=Path("eval/results/training_memory.json"))
    args = parser.parse_args()
    rows = measure(args.threads)
    result = {"environment": llmqat.environment(), "shape": SHAPE, "batch": [BATCH, LENGTH], "steps": STEPS}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**result, "variants": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
