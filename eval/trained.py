"""What training adds to post-training quantization, by what trains and how fast: KL divergence from the float model.

    python eval/trained.py --model smollm2 --dataset my.txt --also other.txt --init blockwise --full 2e-3

All cells begin with the same codes, of GPTQ or of block-wise reconstruction, read the same tokens in one order, and
keep the state with the least divergence (or loss) on validation text, which also chooses between them; test text is
scored once each, beside the start. Adapters are measured against the cell of full weights. Cells that the output file
has are not run again.
"""

import argparse
import copy
from pathlib import Path
from typing import Any, NamedTuple

import _results
import torch
from _scores import scores

import llmqat
from llmqat import QuantScheme

RATES = {"scales": {"lr_scale": 3e-3}, "norms": {"lr_float": 1e-3}}
NOTHING = {"lr_scale": 0.0, "lr_float": 0.0}


class Bench(NamedTuple):
    """What every cell shares.

    Attributes:
        args: of the command line.
        start: prepared, with its codes and the float weights beside them.
        reference: the float model, which also teaches full weights.
        rows: to train on.
        held_out: windows that choose.
        test: windows of the numbers to publish, by dataset.
    """

    args: argparse.Namespace
    start: Any
    reference: llmqat.FloatCopy
    rows: torch.Tensor
    held_out: llmqat.Windows
    test: dict[str, llmqat.Windows]

    @classmethod
    def load(cls, args: argparse.Namespace) -> "Bench":
        """Model and data; the start."""
        model, tokenizer = llmqat.load_float(args.model, torch.float32), llmqat.load_tokenizer(args.model)
        corpus = llmqat.load_corpus(args.dataset)
        stream = llmqat.encode(tokenizer, corpus.train, args.calibration_tokens)
        calibration = llmqat.split_stream(stream, args.length, "calibration").split(8)
        options = {"keep_float": True, "storage_dtype": torch.bfloat16, "block_steps": args.block_steps}
        scheme = QuantScheme(args.bits, args.group_size)
        llmqat.prepare(model, scheme, init=args.init, calibration=list(calibration), **options)
        tokens = args.max_steps * args.batch_size * args.length
        rows = llmqat.sequences(tokenizer, corpus.train, args.length, limit=tokens * 2)
        held_out = llmqat.windows(tokenizer, corpus.validation, args.length, args.eval_tokens)
        names = (args.dataset, *args.also)
        test = {name: llmqat.scored_windows(name, tokenizer, args.window, args.eval_tokens) for name in names}
        reference = llmqat.FloatCopy(llmqat.load_float(args.model, torch.float32))
        return cls(args, model, reference, rows, held_out, test)

    def scores(self, model: Any) -> dict[str, Any]:
        """On test text, by dataset."""
        return {name: scores(model, windows, self.reference) for name, windows in self.test.items()}

    def run(self, cell: "Cell") -> dict[str, Any]:
        """Train one cell."""
        args = self.args
        model = copy.deepcopy(self.start)
        torch.manual_seed(cell.seed)
        model = llmqat.add_lora(model, r=args.lora_r) if cell.mode == "lora" else model
        options = {"max_steps": args.max_steps, "batch_size": args.batch_size, "eval_every": args.eval_every}
        rates = {} if cell.mode == "full" else {**NOTHING, **_merged(RATES[word] for word in cell.along)}
        teacher = None if args.loss == "ce" else self.reference if cell.mode == "full" else "self"
        options = {**options, **rates, "lr": cell.lr, "seed": cell.seed}
        if cell.mode == "full":
            beside = {"lr_float": args.lr_float, "lr_scale": args.lr_scale}
            options |= {key: value for key, value in beside.items() if value is not None}
        done = llmqat.finetune(model, self.rows, self.held_out.ids, mode=cell.mode, teacher=teacher, **options)
        return {
            "held_out": done.held_out,
            "best": done.held_out[done.best_step],
            "codes_changed": done.codes_changed,
            "tokens": done.tokens,
            "seconds": done.seconds,
            "test": self.scores(model),
        }


class Cell(NamedTuple):
    """What a cell trains, and how fast.

    Attributes:
        mode: full or lora.
        lr: learning rate.
        along: words of RATES, which train beside adapters.
        seed: of the order of rows, and of adapters.
    """

    mode: str
    lr: float
    along: tuple[str, ...]
    seed: int

    def __str__(self) -> str:
        along = "" if self.mode == "full" else f", {'+'.join(self.along) or 'none'}"
        return f"{self.mode} {self.lr:g}{along}, seed {self.seed}"


def _merged(changes: Any) -> dict[str, float]:
    return {key: value for change in changes for key, value in change.items()}


def cells(args: argparse.Namespace) -> list[Cell]:
    """Every cell, full weights first."""
    found = []
    for seed in args.seeds:
        found += [Cell("full", lr, (), seed) for lr in args.full]
        for along in args.along:
            words = tuple(word for word in along.split("+") if word != "none")
            found += [Cell("lora", lr, words, seed) for lr in args.lr]
    return found


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="directory, Hub id or alias")
    parser.add_argument("--dataset", default="stdlib", help="as in llmqat finetune")
    parser.add_argument("--also", nargs="*", default=[], help="other datasets to score")
    parser.add_argument("--loss", choices=("kd", "ce"), default="kd", help="as in llmqat finetune; ce: loss chooses")
    parser.add_argument("--init", choices=("rtn", "gptq", "blockwise"), default="gptq", help="where training starts")
    parser.add_argument("--block-steps", type=int, default=200, help="of the block-wise start")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="*", default=[3e-3], help="learning rates of adapters")
    parser.add_argument(
        "--along", nargs="+", default=["scales+norms"], help="beside adapters: none, scales, norms or scales+norms"
    )
    parser.add_argument("--full", type=float, nargs="*", default=[5e-3], help="learning rates of full weights")
    parser.add_argument("--lr-float", type=float, help="of norms and embeddings beside full weights")
    parser.add_argument("--lr-scale", type=float, help="of scales beside full weights")
    parser.add_argument("--lora-r", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max-steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens per sequence, and window held out")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of test text")
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of validation, and of each test text")
    parser.add_argument("--calibration-tokens", type=int, default=65536)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("runs/trained.json"))
    return parser.parse_args()


def main() -> None:
    """Run all cells, print a line for each, write the JSON after each."""
    args = arguments()
    torch.set_num_threads(args.threads)
    varied = ("lr", "along", "full", "seeds", "output", "threads")
    fixed = {key: value for key, value in vars(args).items() if key not in varied}
    header = {"environment": llmqat.environment(), "arguments": fixed}
    results = _results.begun(args.output, header, "cells", {})
    bench = None if all(str(cell) in results["cells"] for cell in cells(args)) else Bench.load(args)
    if bench is not None:
        complete(results, bench)
    show(args.init, results["start"])
    for name, row in results["cells"].items():
        show(f"{name}: held out {row['best']:.5f}", row["test"])


def complete(results: dict[str, Any], bench: Bench) -> None:
    """Score the start and run the cells that `results` lacks, written one by one."""
    args = bench.args
    if "start" not in results:
        results["start"] = bench.scores(bench.start)
        _results.write(args.output, results)
    for cell in cells(args):
        if str(cell) not in results["cells"]:
            results["cells"][str(cell)] = bench.run(cell)
            _results.write(args.output, results)


def show(name: str, test: dict[str, Any]) -> None:
    """Print a line."""
    scores = "".join(f"  {text} {row['perplexity']:.4f}, KL {row['kl']:.5f}" for text, row in test.items())
    print(f"{name:<56}{scores}", flush=True)


if __name__ == "__main__":
    main()
