"""Post-training quantization side by side: round to nearest, GPTQ, block-wise reconstruction, and AutoRound.

    python eval/post_training.py --model smollm2 --dataset my.txt --also other.txt --group-size 64

All start from the same float model, on the same grid, and see the same calibration ids, of the training text of
--dataset. Scored in float32 on its test text and on that of --also: what a method learned of one text, and what of the
model. --blocks N quantizes the first N blocks and leaves the rest float, in a fraction of the time. AutoRound (arXiv
2309.05516) needs an environment of its own, made on first use from autoround_env.txt.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _peers.environments import from_requirements
from _results import begun, write
from _scores import scores

import llmqat
from llmqat import QuantScheme

HERE = Path(__file__).parent
TOKENIZED = 8_000_000  # of the training text, as in `llmqat quantize`
PEER = "auto-round"
METHODS = ("rtn", "gptq", "blockwise", PEER)


class Comparison:
    """The float model and the data; quantizes by one method after the other, and scores what came of it."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.directory = scratch / "float"
        self.float_model().save_pretrained(self.directory)
        tokenizer = llmqat.load_tokenizer(args.model)
        tokenizer.save_pretrained(self.directory)
        self.calibration = self.calibration_rows(tokenizer)
        self.texts = {
            name: llmqat.scored_windows(name, tokenizer, args.window, args.eval_tokens, args.bos)
            for name in (args.dataset, *args.also)
        }
        self.reference = llmqat.FloatCopy(self.float_model())
        self.scheme = QuantScheme(bits=args.bits, group_size=args.group_size, symmetric=not args.asym)

    def float_model(self) -> Any:
        """A fresh copy of the float model, in float32, that is not to train."""
        return llmqat.load_float(self.args.model, torch.float32).requires_grad_(False)

    def calibration_rows(self, tokenizer: Any) -> torch.Tensor:
        """``(samples, length)`` ids of the training text, drawn by the seed."""
        samples, length = self.args.samples, self.args.length
        documents = llmqat.load_corpus(self.args.dataset).train
        rows = llmqat.sequences(tokenizer, documents, length, TOKENIZED, "calibration", self.args.bos)
        if len(rows) < samples:
            raise SystemExit(f"the training text gives {len(rows)} rows of {length} tokens; --samples is {samples}")
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))[:samples]]

    def run(self, method: str) -> dict[str, Any]:
        """Quantize by a method and score."""
        model, started = self.float_model(), time.perf_counter()
        if method == PEER:
            model, found = self.run_peer(model)
        else:
            cpu = time.process_time()
            batches = None if method == "rtn" else list(self.calibration.split(self.args.batch))
            overrides = self.float_rest(model)
            if self.args.average_bits is not None:
                few = self.calibration[:16].split(4)
                chosen = llmqat.choose_bits(model, self.scheme, few, self.args.average_bits, overrides=overrides)
                overrides = {**chosen, **overrides}
            options = {"overrides": overrides, "block_steps": self.args.steps, "min_coverage": 0.0}
            llmqat.prepare(model, self.scheme, init=method, calibration=batches, **options)
            found = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu}
        return found | {name: scores(model, windows, self.reference) for name, windows in self.texts.items()}

    def float_rest(self, model: Any) -> dict[str, Any]:
        """Overrides that leave the blocks behind the first ``--blocks`` float."""
        blocks = len(model.get_decoder().layers)
        rest = "|".join(str(block) for block in range(self.args.blocks or blocks, blocks))
        return {rf"\.layers\.({rest})\.": "float"} if rest else {}

    def run_peer(self, model: Any) -> tuple[Any, dict[str, Any]]:
        """AutoRound in its own environment: the model that it makes of the float one, and what it took."""
        python = from_requirements(self.args.peer_env, HERE / "autoround_env.txt")
        options = {"steps": self.args.steps, "batch": self.args.batch, "seed": self.args.seed}
        found = llmqat.quantized_by(
            PEER,
            str(self.directory),
            self.scheme,
            self.calibration.split(self.args.batch),
            overrides=self.float_rest(model),
            python=str(python),
            **options,
        )
        told = {"versions": found.versions, "seconds": found.seconds, "cpu_seconds": found.cpu_seconds}
        return found.model, told


def show(method: str, row: dict[str, Any], texts: list[str]) -> None:
    """Print a line of the table."""
    scores = "".join(f" {row[text]['perplexity']:10.4f} {row[text]['kl']:9.5f}" for text in texts)
    print(f"{method:<12}{scores} {row['seconds']:9.0f} {row['cpu_seconds']:9.0f}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="Hub id, directory, GGUF file or alias")
    parser.add_argument("--dataset", default="stdlib", help="as in `llmqat quantize`: calibration, and test text")
    parser.add_argument("--also", nargs="*", default=[], help="other datasets to score")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument(
        "--average-bits", type=float, help="chosen by layer, but for AutoRound's; see llmqat.choose_bits"
    )
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--asym", action="store_true", help="with zero points")
    parser.add_argument("--steps", type=int, default=200, help="of block-wise reconstruction and of AutoRound")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration row")
    parser.add_argument("--batch", type=int, default=8, help="calibration rows in a batch, and in a step of AutoRound")
    parser.add_argument("--seed", type=int, default=0, help="which calibration rows")
    parser.add_argument("--bos", default="tokenizer", help="window: open every sequence by BOS, which Gemma needs")
    parser.add_argument("--blocks", type=int, help="quantize only so many")
    parser.add_argument("--window", type=int, default=512, help="tokens of an evaluation window")
    parser.add_argument("--eval-tokens", type=int, default=65536, help="upper limit of tokens scored, of each text")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads, of both tools")
    parser.add_argument("--peer-env", type=Path, default=Path("runs/autoround-env"), help="made on first use")
    parser.add_argument("--output", type=Path, default=Path("runs/post_training.json"))
    return parser.parse_args()


def main() -> None:
    """Compare, print the table, write the JSON after every row; rows that it holds are not run again."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        run = Comparison(args, Path(scratch))
        told = {key: value for key, value in vars(args).items() if key not in ("methods", "output", "peer_env")}
        tokens = {name: windows.sha256 for name, windows in run.texts.items()}
        header = {"settings": told, "tokens": tokens, "environment": llmqat.environment()}
        result = begun(args.output, header, "rows", {})
        print(f"{run.scheme}: perplexity and KL on {', '.join(run.texts)}; seconds, CPU seconds", flush=True)
        for method in args.methods:
            if method not in result["rows"]:
                result["rows"][method] = run.run(method)
                write(args.output, result)
            show(method, result["rows"][method], list(run.texts))


if __name__ == "__main__":
    main()
