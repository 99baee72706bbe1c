"""Perplexity over bits x group size x method, on one float model and the same test windows.

    python eval/perplexity.py --model llama --bits 3 4 8 --group-size 32 128 --methods rtn gptq
    python eval/perplexity.py --model llama --bits 4 --group-size 32 --methods gptq qat --max-steps 300

Methods: rtn (round to nearest), gptq, qat (GPTQ, then full fine-tuning by distillation from the float model). Every
quantized model is packed, loaded again and scored through the kernel op. Results go to --output as JSON, with machine,
versions, windows, token count and the hash of the ids.
"""

import argparse
import copy
import json
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import llmqat
from llmqat import QuantScheme

METHODS = ("rtn", "gptq", "qat")
LENGTH, BATCH = 512, 8


@dataclass
class Sweep:
    """What every point of the sweep shares."""

    model: Any
    stored: torch.dtype
    tokenizer: Any
    tokens: Tensor
    held_out: Tensor
    test: llmqat.Windows
    reference: llmqat.FloatCopy
    calibration: list[Tensor]
    max_steps: int

    @classmethod
    def load(cls, args: argparse.Namespace) -> "Sweep":
        """Model, data and calibration batches of a sweep."""
        model, stored = llmqat.load_float(args.model, torch.float32)
        tokenizer, corpus = llmqat.load_tokenizer(args.model), llmqat.load_corpus(args.dataset)
        length = min(LENGTH, model.config.max_position_embeddings)
        tokens = llmqat.blocks(llmqat.encode(tokenizer, corpus.train), length, "training")
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[: args.samples]
        return cls(
            model,
            stored,
            tokenizer,
            tokens,
            llmqat.windows(tokenizer, corpus.validation, length, 16384).ids,
            llmqat.windows(tokenizer, corpus.test, args.window, args.eval_tokens),
            llmqat.FloatCopy(copy.deepcopy(model)),
            list(tokens[order].split(BATCH)),
            args.max_steps,
        )

    def point(self, scheme: QuantScheme, method: str) -> dict[str, Any]:
        """Quantize by `method`, pack, load, score."""
        started = time.perf_counter()
        model = copy.deepcopy(self.model)
        init = "rtn" if method == "rtn" else "gptq"
        llmqat.prepare(model, scheme, init=init, calibration=self.calibration, storage_dtype=self.stored)
        if method == "qat":
            options = {"max_steps": self.max_steps}
            teacher = self.reference.model
            llmqat.finetune(model, self.tokens, self.held_out, mode="full", teacher=teacher, options=options)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as directory:
            llmqat.pack(model, directory)
            packed = llmqat.load(directory, torch.float32)
        result = llmqat.evaluate(packed, self.test, self.reference)
        return {
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "method": method,
            "perplexity": result.perplexity,
            "kl_to_float": result.kl_to_float,
            "top1_agreement": result.top1_agreement,
            "seconds": seconds,
        }


def main() -> None:
    """Run the sweep, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="directory, Hub id or llama")
    parser.add_argument("--dataset", default="stdlib")
    parser.add_argument("--bits", type=int, nargs="+", default=[3, 4, 8])
    parser.add_argument("--group-size", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["rtn", "gptq"])
    parser.add_argument("--asym", action="store_true", help="asymmetric grids")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--max-steps", type=int, default=300, help="training steps of qat")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--output", type=Path, default=Path("eval/results/perplexity.json"))
    args = parser.parse_args()
    sweep = Sweep.load(args)
    base = llmqat.evaluate(sweep.model, sweep.test).perplexity
    result: dict[str, Any] = {
        "environment": llmqat.environment(),
        "model": args.model,
        "dataset": args.dataset,
        "window": args.window,
        "tokens": {
            "eval": sweep.test.tokens,
            "eval_sha256": sweep.test.sha256,
            "calibration": sum(batch.numel() for batch in sweep.calibration),
        },
        "float": base,
        "points": [],
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(f"float {base:.4f}")
    print(f"{'bits':>4} {'group':>6} {'method':>7} {'perplexity':>11} {'vs float':>9} {'KL':>8} {'top-1':>7}")
    for bits, group_size, method in product(args.bits, args.group_size, args.methods):
        point = sweep.point(QuantScheme(bits, group_size, not args.asym), method)
        result["points"].append(point)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
        print(
            f"{bits:>4} {group_size:>6} {method:>7} {point['perplexity']:>11.4f} "
            f"{point['perplexity'] / base - 1:>+9.2%} "
            f"{point['kl_to_float']:>8.5f} {point['top1_agreement']:>7.2%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
