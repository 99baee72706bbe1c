"""How fast a language model trains on a CPU: by the compiled kernels, by torch alone, and in float.

    python eval/training_speed.py --model smollm2 --output eval/results/training_speed.json

Random token ids, 4 x 256 a step, groups of 64, bfloat16 autocast. "distil" is `llmqat.finetune` with its default loss,
the distance from the float model in logits and hidden states, timed as it times itself. A sample is what some steps and
one take longer than one alone, which leaves out the held-out loss and the counting of codes after the last. "float" is
a step of all weights of the unquantized model by cross-entropy, through torch. Variants take turns in one process, so
that noise of the machine meets all alike; `LLMQAT_TRAINING` tells which kernels run.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import llmqat
from llmqat import QuantScheme

BATCH, LENGTH, GROUP, RANK = 4, 256, 64, 32
SWITCH = "LLMQAT_TRAINING"
KERNELS = {"kernels": "", "torch": "torch"}  # name of a variant -> what the switch says


class FloatSteps:
    """Steps of all weights of the float model by cross-entropy, through torch."""

    def __init__(self, model: str) -> None:
        self.model = llmqat.load_float(model).float().train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def __call__(self, steps: int, ids: torch.Tensor) -> float:
        """Seconds a step, the mean of some."""
        started = time.perf_counter()
        for batch in ids.split(BATCH):
            with torch.autocast("cpu", torch.bfloat16):
                loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return (time.perf_counter() - started) / steps


class Distillation:
    """Steps of `llmqat.finetune` on one prepared model, which goes on training from sample to sample."""

    def __init__(self, model: str, mode: str) -> None:
        self.mode, self.teacher = mode, "self" if mode == "lora" else llmqat.load_float(model)
        self.model: Any = llmqat.load_float(model)
        llmqat.prepare(self.model, QuantScheme(bits=4, group_size=GROUP), storage_dtype=torch.bfloat16)
        if mode == "lora":
            self.model = llmqat.add_lora(self.model, r=RANK)

    def __call__(self, steps: int, ids: torch.Tensor) -> float:
        """Seconds a step, the mean of some."""
        return (self.seconds(1 + steps, ids) - self.seconds(1, ids)) / steps

    def seconds(self, steps: int, ids: torch.Tensor) -> float:
        """Seconds of some steps and what follows the last."""
        options = {"max_steps": steps, "batch_size": BATCH, "eval_every": steps, "lr": 1e-6}
        return llmqat.finetune(self.model, ids, ids[:1], mode=self.mode, teacher=self.teacher, **options).seconds


def variants(model: str, modes: list[str]) -> dict[str, tuple[str, Callable[[int, torch.Tensor], float]]]:
    """Each variant by name: what the switch says, and what takes its steps."""
    found: dict[str, tuple[str, Callable[[int, torch.Tensor], float]]] = {}
    if "float" in modes:
        found["full float, torch"] = ("torch", FloatSteps(model))
    for mode in [mode for mode in modes if mode != "float"]:
        for name, switch in KERNELS.items():
            found[f"{mode} distil, {name}"] = (switch, Distillation(model, mode))
    return found


def measure(args: argparse.Namespace) -> Iterator[dict[str, list[float]]]:
    """Seconds a step of every variant, by turns, after each round; the first round warms up and is dropped."""
    words = llmqat.load_float(args.model).config.vocab_size
    ids = torch.randint(words, (args.steps * BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    steppers = variants(args.model, args.modes.split(","))
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for round_ in range(args.rounds + 1):
        for name, (switch, stepper) in steppers.items():
            os.environ[SWITCH] = switch
            taken = stepper(args.steps, ids)
            print(f"round {round_}: {name:<24} {taken:7.3f} s a step", flush=True)
            if round_:
                seconds[name].append(taken)
        if round_:
            yield seconds


def main() -> None:
    """Measure, print a table, write the JSON after each round."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="name or directory of a float model (default: smollm2)")
    parser.add_argument("--modes", default="lora,full,float", help="of lora, full and float (default: all)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each variant (default: 7)")
    parser.add_argument("--steps", type=int, default=4, help="steps of a sample (default: 4)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--output", type=Path, help="JSON file; none by default")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {"environment": llmqat.environment(), "model": args.model, "steps": args.steps}
    result |= {"batch": [BATCH, LENGTH], "group_size": GROUP, "variants": {}}
    for seconds in measure(args):
        for name, samples in seconds.items():
            median = statistics.median(samples)
            row = {"seconds": samples, "median": median, "tokens_per_second": BATCH * LENGTH / median}
            result["variants"][name] = row
        if args.output is not None:
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(result, indent=2) + "\n")
    for name, row in result["variants"].items():
        low, high = min(row["seconds"]), max(row["seconds"])
        print(f"{name:<24} {row['median']:7.3f} s a step [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
