"""What LoRA trains, and how fast: held-out KL divergence by learning rate, with and without scales and norms.

    python eval/lora_ablation.py --model llama --bits 3 --full --output eval/results/lora_ablation_w3.json

All cells begin with the same codes of GPTQ, read the same tokens in the same order, and keep the state with the least
divergence from the float model on validation text, which also chooses between them; test text is scored once each. The
cell of full weights, at its default rate, is what adapters are measured against. Cells that the output file has are not
run again.
"""

import argparse
import copy
from pathlib import Path
from typing import Any, NamedTuple

import _results
import torch

import llmqat
from llmqat import QuantScheme

RATES = {"scales": {"lr_scale": 3e-3}, "norms": {"lr_float": 1e-3}}
NOTHING = {"lr_scale": 0.0, "lr_float": 0.0}


class Bench(NamedTuple):
    """What every cell shares.

    Attributes:
        args: of the command line.
        start: prepared, with the codes of GPTQ and the float weights beside them.
        rows: to train on.
        held_out: windows that choose.
        test: windows of the numbers to publish.
    """

    args: argparse.Namespace
    start: Any
    rows: torch.Tensor
    held_out: llmqat.Windows
    test: llmqat.Windows

    @classmethod
    def load(cls, args: argparse.Namespace) -> "Bench":
        """Model and data; GPTQ."""
        model, tokenizer = llmqat.load_float(args.model, torch.float32), llmqat.load_tokenizer(args.model)
        corpus = llmqat.load_corpus(args.dataset)
        stream = llmqat.encode(tokenizer, corpus.train, args.calibration_tokens)
        calibration = llmqat.split_stream(stream, args.length, "calibration").split(8)
        options = {"calibration": list(calibration), "keep_float": True, "storage_dtype": torch.bfloat16}
        llmqat.prepare(model, QuantScheme(args.bits, args.group_size), init="gptq", **options)
        rows = llmqat.sequences(
            tokenizer, corpus.train, args.length, limit=args.max_steps * args.batch_size * args.length * 2
        )
        splits = (corpus.validation, corpus.test)
        windows = [llmqat.windows(tokenizer, split, args.length, args.eval_tokens) for split in splits]
        return cls(args, model, rows, *windows)

    def run(self, lr: float | None, along: str, seed: int) -> dict[str, Any]:
        """Train one cell; `along` are the words of RATES that it trains beside its adapters, or full."""
        args, mode = self.args, "full" if along == "full" else "lora"
        model = copy.deepcopy(self.start)
        reference = llmqat.FloatCopy(llmqat.load_float(args.model, torch.float32))
        torch.manual_seed(seed)
        model = llmqat.add_lora(model, r=args.lora_r) if mode == "lora" else model
        rates = {} if mode == "full" else {**NOTHING, **_merged(RATES[word] for word in along.split("+") if word)}
        options = {"max_steps": args.max_steps, "batch_size": args.batch_size, "eval_every": args.eval_every, **rates}
        rate = {} if lr is None else {"lr": lr}
        teacher = reference if mode == "full" else "self"
        done = llmqat.finetune(
            model, self.rows, self.held_out.ids, mode=mode, teacher=teacher, seed=seed, **options, **rate
        )
        found = llmqat.evaluate(model, self.test, reference)
        return {
            "held_out": done.held_out,
            "best": done.held_out[done.best_step],
            "codes_changed": done.codes_changed,
            "perplexity": found.perplexity,
            "kl_to_float": found.kl_to_float,
            "tokens": done.tokens,
            "seconds": done.seconds,
        }


def _merged(changes: Any) -> dict[str, float]:
    return {key: value for change in changes for key, value in change.items()}


def cells(args: argparse.Namespace) -> list[tuple[str, float | None, str, int]]:
    """Name, learning rate, what trains along, and seed of every cell."""
    found: list[tuple[str, float | None, str, int]] = []
    for seed in args.seeds:
        for lr in args.lr:
            for along in args.along:
                words = along.replace("none", "")
                found.append((f"lora {lr:g}, {along}, seed {seed}", lr, words, seed))
        if args.full:
            found.append((f"full, seed {seed}", None, "full", seed))
    return found


def main() -> None:
    """Run all cells, print a line for each, write the JSON after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="directory, Hub id or llama")
    parser.add_argument("--dataset", default="stdlib", help="as in llmqat finetune")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-3, 1e-2, 2e-2], help="learning rates of adapters")
    parser.add_argument(
        "--along", nargs="+", default=["none", "scales+norms"], help="none, scales, norms or scales+norms"
    )
    parser.add_argument("--full", action="store_true", help="full weights too")
    parser.add_argument("--lora-r", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence and window")
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of validation, and of test")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--output", type=Path, default=Path("eval/results/lora_ablation.json"))
    args = parser.parse_args()
    varied = ("lr", "along", "full", "seeds", "output")
    fixed = {key: value for key, value in vars(args).items() if key not in varied}
    header = {"environment": llmqat.environment(), "arguments": fixed}
    results = _results.begun(args.output, header, "cells", {})
    missing = [cell for cell in cells(args) if cell[0] not in results["cells"]]
    bench = Bench.load(args) if missing else None
    for name, lr, along, seed in missing:
        assert bench is not None
        results["cells"][name] = bench.run(lr, along, seed)
        _results.write(args.output, results)
    for name, cell in results["cells"].items():
        print(f"{name:<36} held-out {cell['best']:.5f}  test {cell['kl_to_float']:.5f}", flush=True)


if __name__ == "__main__":
    main()
