"""Perplexity over bits x group size x method, on one float model and the same test windows.

    python eval/perplexity.py                                                    # 12 points, minutes on one core
    python eval/perplexity.py --bits 3 4 --group-size 32 --methods qat           # adds two to them
    python eval/perplexity.py --model ./my-model --dataset wikitext2 --window 2048 --bos tokenizer --output out.json

Methods: rtn (round to nearest), gptq, qat (GPTQ, then full fine-tuning by distillation from the float model). Every
quantized model is packed, loaded again and scored through the kernel op. Results go to --output as JSON after every
point, with machine, versions, windows, token count and the hash of the ids; a point that is there already, measured
under the same conditions, is not measured again.
"""

import argparse
import copy
import tempfile
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _results import begun, write
from torch import Tensor

import llmqat
from llmqat import QuantScheme

METHODS = ("rtn", "gptq", "qat")
LENGTH, BATCH = 512, 8
TOKENIZED = 8_000_000  # of the training text, as in `llmqat quantize`


@dataclass
class Sweep:
    """What every point of the sweep shares."""

    model: Any
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
        model = llmqat.load_float(args.model, torch.float32)
        tokenizer, corpus = llmqat.load_tokenizer(args.model), llmqat.load_corpus(args.dataset)
        length = min(LENGTH, model.config.max_position_embeddings)
        tokens = llmqat.split_stream(llmqat.encode(tokenizer, corpus.train, TOKENIZED), length, "training")
        order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))[: args.samples]
        return cls(
            model,
            tokenizer,
            tokens,
            llmqat.windows(tokenizer, corpus.validation, length, 16384).ids,
            llmqat.scored_windows(args.dataset, tokenizer, args.window, args.eval_tokens, args.bos, corpus.test),
            llmqat.FloatCopy(copy.deepcopy(model)),
            list(tokens[order].split(BATCH)),
            args.max_steps,
        )

    def point(self, scheme: QuantScheme, method: str) -> dict[str, Any]:
        """Quantize by `method`, pack, load, score."""
        torch.manual_seed(0)
        started = time.perf_counter()
        model = copy.deepcopy(self.model)
        init = "rtn" if method == "rtn" else "gptq"
        llmqat.prepare(model, scheme, init=init, calibration=self.calibration)
        if method == "qat":
            options = {"max_steps": self.max_steps}
            teacher = self.reference.model
            llmqat.finetune(model, self.tokens, self.held_out, mode="full", teacher=teacher, **options)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory() as directory:
            llmqat.pack(model, directory)
            packed = llmqat.load(directory, torch.float32)
        result = llmqat.evaluate(packed, self.test, self.reference)
        return {
            **self.settings(scheme, method),
            "perplexity": result.perplexity,
            "kl_to_float": result.kl_to_float,
            "top1_agreement": result.top1_agreement,
            "seconds": seconds,
        }

    def settings(self, scheme: QuantScheme, method: str) -> dict[str, Any]:
        """What tells a point from the others."""
        steps = self.max_steps if method == "qat" else 0
        grid = {key: scheme.to_dict()[key] for key in ("bits", "group_size", "symmetric")}
        return {**grid, "method": method, "max_steps": steps}


def show(point: dict[str, Any], base: float) -> None:
    """Print a row of the table."""
    name = f"{point['bits']:>4} {point['group_size']:>6} {'sym' if point['symmetric'] else 'asym':>5} "
    print(
        f"{name}{point['method']:>7} {point['perplexity']:>11.4f} {point['perplexity'] / base - 1:>+9.2%} "
        f"{point['kl_to_float']:>8.5f} {point['top1_agreement']:>7.2%} {point['seconds']:>8.1f}",
        flush=True,
    )


def arguments() -> argparse.Namespace:
    """The command line."""
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
    parser.add_argument("--bos", default="stream", help="BOS rule; papers: tokenizer")
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--output", type=Path, default=Path("eval/results/perplexity.json"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    return parser.parse_args()


def main() -> None:
    """Run the sweep, print a table, write the JSON after every point."""
    args = arguments()
    torch.set_num_threads(args.threads)
    sweep = Sweep.load(args)
    base = llmqat.evaluate(sweep.model, sweep.test).perplexity
    header = {
        "environment": {"llmqat": llmqat.__version__, **llmqat.environment()},
        "model": args.model,
        "dataset": args.dataset,
        "protocol": sweep.test.protocol,
        "tokens": {
            "eval": sweep.test.tokens,
            "eval_sha256": sweep.test.sha256,
            "calibration": sum(batch.numel() for batch in sweep.calibration),
        },
        "float": base,
    }
    result = begun(args.output, header, "points", [])
    print(f"float {base:.4f}; {sweep.test.protocol}")
    print("bits  group        method  perplexity  vs float       KL   top-1  seconds")
    for bits, group_size, method in product(args.bits, args.group_size, args.methods):
        scheme = QuantScheme(bits, group_size, not args.asym)
        wanted = sweep.settings(scheme, method).items()
        point = next((point for point in result["points"] if wanted <= point.items()), None)
        if point is None:
            point = sweep.point(scheme, method)
            result["points"].append(point)
            write(args.output, result)
        show(point, base)


if __name__ == "__main__":
    main()
