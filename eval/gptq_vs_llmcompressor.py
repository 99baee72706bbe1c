"""llmqat's GPTQ against llm-compressor's: same float model, scheme, calibration tokens, damping, and scoring.

    python eval/gptq_vs_llmcompressor.py --output eval/results/gptq_vs_llmcompressor.json

Both tools write a compressed-tensors directory, which `llmqat.load` reads back and `llmqat.evaluate` scores in float32.
Calibration batches are the same ids in the same batches: the rows that `llmqat quantize` takes. llm-compressor runs
with its defaults (activation order "static", ranges by min/max), and with each of its own range searches, so that
llmqat is compared with the best of it. It needs an environment of its own, made on first use from
llmcompressor_env.txt.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _peers.environments import from_requirements
from _results import begun, write
from safetensors.torch import save_file

import llmqat
from llmqat import QuantScheme

HERE = Path(__file__).parent
BATCH, DAMP = 8, 0.01
TOKENIZED = 8_000_000  # of the training text, as in `llmqat quantize`
# Row -> method, and observer (None is llm-compressor's default).
PEER = {
    "llmcompressor rtn": ("rtn", None),
    "llmcompressor gptq": ("gptq", None),
    "llmcompressor gptq, mse": ("gptq", "mse"),
    "llmcompressor gptq, imatrix_mse": ("gptq", "imatrix_mse"),
}
GRIDS = {"symmetric": True, "asymmetric": False}
OURS = {"llmqat rtn": "rtn", "llmqat gptq": "gptq"}


class Comparison:
    """The float model, the data, and a scratch folder; scores one quantized directory after another."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.float_directory = scratch / "float"
        model = llmqat.load_float(args.model)
        self.stored_dtype = model.dtype
        model.save_pretrained(self.float_directory)  # whatever --model names, both tools read this directory
        tokenizer = llmqat.load_tokenizer(args.model)
        tokenizer.save_pretrained(self.float_directory)
        corpus = llmqat.load_corpus(args.dataset)
        self.test = llmqat.windows(tokenizer, corpus.test, args.window, args.eval_tokens)
        self.calibration = self.calibration_batches(tokenizer, corpus.train)
        save_file({"input_ids": self.calibration}, scratch / "calibration.safetensors")
        self.reference = llmqat.FloatCopy(self.float_model())
        self.float_losses = llmqat.evaluate(self.reference.model, self.test).losses

    def float_model(self) -> Any:
        """A fresh copy of the float model, in float32."""
        return llmqat.load_float(str(self.float_directory), torch.float32)

    def calibration_batches(self, tokenizer: Any, documents: list[str]) -> torch.Tensor:
        """``(batches, BATCH, length)`` ids: sequences of the training text, drawn by the seed."""
        samples, length = self.args.samples, self.args.length
        stream = llmqat.encode(tokenizer, documents, max(samples * length, TOKENIZED))
        rows = llmqat.split_stream(stream, length, "calibration")
        if len(rows) < samples:
            raise SystemExit(f"the training text gives {len(rows)} rows of {length} tokens; --samples is {samples}")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.args.seed))
        return rows[order[:samples]].view(-1, BATCH, length)

    def score(self, directory: Path) -> dict[str, Any]:
        """Perplexity and KL to the float model of a packed directory, computed in float32."""
        result = llmqat.evaluate(llmqat.load(directory, torch.float32), self.test, self.reference)
        return {"perplexity": result.perplexity, "kl_to_float": result.kl_to_float, "losses": result.losses}

    def run_ours(self, scheme: QuantScheme, init: str) -> dict[str, Any]:
        """Quantize by llmqat, pack, score."""
        model = self.float_model()
        started = time.perf_counter()
        batches = list(self.calibration) if init == "gptq" else None
        llmqat.prepare(model, scheme, init=init, calibration=batches, damp=DAMP)
        seconds = time.perf_counter() - started
        with tempfile.TemporaryDirectory(dir=self.scratch) as output:
            row = self.score(llmqat.pack(model, output))
        settings = {"init": init, "dtype": "float32", "scale_dtype": str(self.stored_dtype).removeprefix("torch.")}
        return {**row, "seconds": seconds, "settings": settings | ({"damp": DAMP} if init == "gptq" else {})}

    def run_peer(self, scheme: QuantScheme, method: str, observer: str | None, python: Path) -> dict[str, Any]:
        """Quantize by llm-compressor in its own environment, score what it saved."""
        with tempfile.TemporaryDirectory(dir=self.scratch) as output:
            job = {
                "model": str(self.float_directory),
                "calibration": str(self.scratch / "calibration.safetensors"),
                "output": output,
                "method": method,
                "observer": observer,
                "damp": DAMP,
                "dtype": self.args.peer_dtype or str(self.stored_dtype).removeprefix("torch."),
                "threads": torch.get_num_threads(),
                **{key: scheme.to_dict()[key] for key in ("bits", "group_size", "symmetric")},
            }
            command = [python, HERE / "_llmcompressor_worker.py", json.dumps(job)]
            outside = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
            done = subprocess.run(command, env=outside, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                raise SystemExit(f"llm-compressor failed on {job}:\n{done.stdout[-4000:]}")
            return {**json.loads((Path(output) / "worker.json").read_text()), **self.score(Path(output))}


def compare(run: Comparison, scheme: QuantScheme, python: Path) -> dict[str, dict[str, Any]]:
    """All rows of one scheme; each with its loss against llmqat's GPTQ, paired over windows."""
    rows = {name: run.run_ours(scheme, init) for name, init in OURS.items()}
    for name, (method, observer) in PEER.items():
        rows[name] = run.run_peer(scheme, method, observer, python)
    ours = rows["llmqat gptq"]["losses"]
    for row in rows.values():
        difference = row.pop("losses") - ours
        row["loss_minus_llmqat_gptq"] = float(difference.mean())
        row["standard_error"] = float(difference.std(ddof=1) / len(difference) ** 0.5)
    return rows


def show(scheme: QuantScheme, rows: dict[str, dict[str, Any]]) -> None:
    """Print the table of one scheme."""
    print(f"\n{scheme!s:<34} {'perplexity':>10} {'KL':>8} {'loss - llmqat gptq':>19} {'seconds':>8}")
    for name, row in rows.items():
        difference = f"{row['loss_minus_llmqat_gptq']:+.4f} ± {row['standard_error']:.4f}"
        numbers = f"{row['perplexity']:10.4f} {row['kl_to_float']:8.5f} {difference:>19} {row['seconds']:8.1f}"
        print(f"{name:<34} {numbers}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="Hub id, directory or alias (default: the bundled llama)")
    parser.add_argument("--dataset", default="stdlib", help="as in `llmqat quantize`")
    parser.add_argument("--samples", type=int, default=128, help=f"calibration rows, a multiple of {BATCH}")
    parser.add_argument("--length", type=int, default=512, help="tokens of a calibration row")
    parser.add_argument("--seed", type=int, default=0, help="which calibration rows")
    parser.add_argument("--window", type=int, default=512, help="tokens of an evaluation window")
    parser.add_argument("--eval-tokens", type=int, default=65536, help="upper limit of tokens scored")
    parser.add_argument("--group-size", type=int, nargs="+", default=[128, 32])
    parser.add_argument("--grid", choices=list(GRIDS), nargs="+", default=list(GRIDS))
    parser.add_argument("--peer-env", type=Path, default=Path("runs/llmcompressor-env"), help="made on first use")
    parser.add_argument(
        "--peer-dtype", choices=["float32", "bfloat16"], help="default: the dtype the model is stored in"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads, of both tools")
    parser.add_argument("--output", type=Path, default=Path("eval/results/gptq_vs_llmcompressor.json"))
    args = parser.parse_args()
    if args.samples < BATCH or args.samples % BATCH:
        parser.error(f"--samples must be a multiple of {BATCH}, got {args.samples}")
    return args


def main() -> None:
    """Compare, print tables, write the JSON after every scheme; schemes that it holds are not run again."""
    args = arguments()
    torch.set_num_threads(args.threads)
    python = from_requirements(args.peer_env, HERE / "llmcompressor_env.txt")
    with tempfile.TemporaryDirectory() as scratch:
        run = Comparison(args, Path(scratch))
        ids = llmqat.Windows(run.calibration.flatten(0, 1), "none")
        header = {  # rows are compared within a scheme, so schemes may be of several machines
            "model": args.model,
            "dataset": args.dataset,
            "seed": args.seed,
            "calibration": {"tokens": ids.tokens, "shape": list(run.calibration.shape), "sha256": ids.sha256},
            "eval": {"tokens": run.test.tokens, "window": args.window, "bos": run.test.bos, "sha256": run.test.sha256},
        }
        measured_with = {
            "environment": {"llmqat": llmqat.__version__, **llmqat.environment()},
            "float_perplexity": float(np.exp(run.float_losses.mean())),
        }
        print(f"float perplexity {measured_with['float_perplexity']:.4f}", flush=True)
        result = begun(args.output, header, "schemes", {})
        for symmetric, group_size in product([GRIDS[grid] for grid in args.grid], args.group_size):
            scheme = QuantScheme(bits=4, group_size=group_size, symmetric=symmetric)
            if str(scheme) not in result["schemes"]:
                rows = compare(run, scheme, python)
                entry = {**measured_with, "rows": rows}
                for name in PEER:
                    entry["peer_environment"] = rows[name].pop("environment")
                result["schemes"][str(scheme)] = entry
                write(args.output, result)
            show(scheme, result["schemes"][str(scheme)]["rows"])


if __name__ == "__main__":
    main()
