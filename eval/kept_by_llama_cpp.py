"""What llama.cpp keeps of a fine-tuned model: trained through the grid of Q4_0, or trained in float and then quantized.

    python eval/kept_by_llama_cpp.py --model smollm2 --dataset my.txt --also other.txt --install

Both begin with the same float model and read the same tokens by cross-entropy. One trains by llmqat in groups of 32
with float16 scales, and is exported; the other by transformers' `Trainer`, at several rates of which validation text
chooses, and llama.cpp quantizes it by its own quantizer. Embeddings stay in float16 in all files. llama.cpp scores
every file, llmqat those that it can, on the same ids. Llama's architecture alone: the float file is written here, from
the metadata of the exported one.
"""

import argparse
import json
import math
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

import gguf
import numpy as np
import torch
from _peers import environments
from _results import write
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import llmqat
from llmqat import QuantScheme

WORKER = Path(__file__).with_name("_llama_cpp_worker.py")
GRID = QuantScheme(bits=4, group_size=32, scale_dtype="float16")
OURS, SOURCE = "trained on the grid, Q4_0", "float, trained"
OWN_KEYS = ("general.architecture", "general.file_type", "general.quantization_version")  # of the writer itself
PEERS = {"float, trained, Q4_0": "Q4_0", "float, trained, Q4_K_M": "Q4_K_M"}  # made by llama.cpp of the float file


class Rows(Dataset):
    """Sequences as `Trainer` reads them."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Bench:
    """The model, its data, and where files are written while the tools are compared."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.tokenizer = llmqat.load_tokenizer(args.model)
        corpus = llmqat.load_corpus(args.dataset)
        self.rows = llmqat.sequences(self.tokenizer, corpus.train, args.length, args.steps * args.batch * args.length)
        self.calibration = self.rows[: args.samples].split(8)
        self.validation = llmqat.windows(self.tokenizer, corpus.validation, args.length, args.eval_tokens)
        names = (args.dataset, *args.also)
        # Without BOS: llama.cpp reads what it is given, and the numbers are those of the same ids.
        limits = args.window, args.eval_tokens, "none"
        self.texts = {name: llmqat.scored_windows(name, self.tokenizer, *limits) for name in names}

    def float_model(self) -> Any:
        """A fresh copy of the float model, in float32."""
        return llmqat.load_float(self.args.model, torch.float32)

    def scores(self, model: Any) -> dict[str, Any]:
        """Mean loss of each window, by text."""
        return {name: llmqat.evaluate(model, data).losses.tolist() for name, data in self.texts.items()}

    def train_on_grid(self) -> dict[str, Any]:
        """Train by llmqat through the grid of Q4_0, pack and export."""
        args, model = self.args, self.float_model()
        llmqat.prepare(model, GRID, init=args.init, calibration=list(self.calibration))
        options = {"max_steps": args.steps, "batch_size": args.batch, "seed": args.seed, "eval_every": args.eval_every}
        done = llmqat.finetune(model, self.rows, self.validation.ids, **options)
        packed = llmqat.pack(model, self.scratch / "packed", self.tokenizer)
        llmqat.export(packed, "gguf", self.scratch / "gguf")
        scores = self.scores(llmqat.load(packed, torch.float32))
        return {"validation": done.held_out[done.best_step], "seconds": done.seconds, "scores": scores}

    @property
    def exported(self) -> Path:
        """The GGUF file of the model that llmqat trained."""
        return next((self.scratch / "gguf").glob("*.gguf"))

    def train_in_float(self, lr: float) -> tuple[Any, float]:
        """The float model trained by transformers at a rate, and its loss on validation text."""
        args, model = self.args, self.float_model()
        options = TrainingArguments(
            output_dir=str(self.scratch / "trainer"),
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=args.steps // 10,
            bf16=True,
            use_cpu=True,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        )
        with llmqat.training_kernels(model):
            Trainer(model, options, train_dataset=Rows(self.rows)).train()
        found = self.float_model()  # `Trainer` leaves bfloat16 in the forward of its own
        found.load_state_dict(model.state_dict())
        return found, fmean(llmqat.evaluate(found, self.validation).losses.tolist())

    def write_float(self, model: Any, output: Path) -> Path:
        """A Llama in float16 as a GGUF file, with the metadata of the exported one."""
        reader, writer = gguf.GGUFReader(self.exported), gguf.GGUFWriter(output, "llama")
        copied = (field for field in reader.fields.values() if not field.name.startswith(("GGUF.", *OWN_KEYS)))
        for field in copied:
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for name, values in float_tensors(model).items():
            writer.add_tensor(name, values.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return output

    def llama_cpp(self, files: dict[str, Path]) -> dict[str, Any]:
        """What llama.cpp makes of GGUF files and of its own quantizations, by row and text; and its version."""
        texts = {name: self.scratch / f"{index}.npy" for index, name in enumerate(self.texts)}
        for name, path in texts.items():
            np.save(path, self.texts[name].ids.numpy())
        job, output = self.scratch / "job.json", self.scratch / "output.json"
        told = {
            "files": {name: str(path) for name, path in files.items()},
            "quantize": {name: (SOURCE, kind) for name, kind in PEERS.items()},
            "texts": {name: str(path) for name, path in texts.items()},
            "threads": self.args.threads,
            "output": str(output),
        }
        job.write_text(json.dumps(told))
        python = environments.python_of("llama-cpp", self.args.environments)
        done = subprocess.run([python, WORKER, job], stderr=subprocess.PIPE, text=True)  # it has a line for each tensor
        if done.returncode:
            raise SystemExit(f"llama.cpp failed:\n{done.stderr[-4000:]}")
        return json.loads(output.read_text())


def float_tensors(model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a Llama under their names in GGUF, matrices in float16 with llama.cpp's order of rotary pairs."""
    config, found = model.config, {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, values in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        count = next((count for part, count in heads.items() if part in name), None)
        if count is not None:
            values = values.view(count, 2, -1, values.shape[1]).transpose(1, 2).reshape(values.shape)
        found[names.get_name(name, (".weight",))] = values.half() if values.ndim > 1 else values.float()
    return found


def compare(bench: Bench, results: dict[str, Any], save: Callable[[], None]) -> None:
    """Train both, let llama.cpp quantize and score, and fill in the rows."""
    args, rows = bench.args, results["rows"]
    rows["float"] = {"llmqat": bench.scores(bench.float_model())}
    grid = bench.train_on_grid()
    rows[OURS] = {"llmqat": grid.pop("scores"), **grid}
    save()
    best: tuple[float, Any] = (math.inf, None)
    for lr in args.lr:
        model, loss = bench.train_in_float(lr)
        results["rates"][f"{lr:g}"] = loss
        best = min(best, (loss, model), key=lambda found: found[0])
    rows[SOURCE] = {"llmqat": bench.scores(best[1]), "validation": best[0]}
    save()
    files = {
        "float": bench.write_float(bench.float_model(), bench.scratch / "float.gguf"),
        SOURCE: bench.write_float(best[1], bench.scratch / "trained.gguf"),
        OURS: bench.exported,
    }
    found = bench.llama_cpp(files)
    results["llama-cpp-python"] = found["version"]
    for name, row in found["rows"].items():
        rows[name] = {**rows.get(name, {}), "bytes": row.pop("bytes"), "llama.cpp": row}


def show(results: dict[str, Any]) -> None:
    """Print the perplexities, a line for each model."""
    for name, row in results["rows"].items():
        for engine in ("llmqat", "llama.cpp"):
            texts = "".join(f" {text} {math.exp(fmean(losses)):9.4f}" for text, losses in row.get(engine, {}).items())
            if texts:
                print(f"{name:<26} {engine:<10}{texts} {row.get('bytes', 0) / 1e6:8.1f} MB", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2", help="a Llama: directory, Hub id or alias")
    parser.add_argument("--dataset", default="stdlib", help="as in `llmqat finetune`: what is trained on, and scored")
    parser.add_argument("--also", nargs="*", default=[], help="other datasets to score")
    parser.add_argument("--init", choices=("rtn", "gptq", "blockwise"), default="gptq", help="where the grid starts")
    parser.add_argument("--lr", type=float, nargs="+", default=[3e-5, 1e-4], help="rates of the float model")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--samples", type=int, default=64, help="sequences that calibrate")
    parser.add_argument("--window", type=int, default=512, help="tokens of a window of test text")
    parser.add_argument("--eval-every", type=int, default=30)
    parser.add_argument("--eval-tokens", type=int, default=16384, help="of validation, and of each test text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--install", action="store_true", help="make the environment of llama.cpp first")
    parser.add_argument("--environments", type=Path, default=Path("runs/peers"), help="where environments are")
    parser.add_argument("--output", type=Path, default=Path("runs/kept_by_llama_cpp.json"))
    return parser.parse_args()


def main() -> None:
    """Compare, print the table, write the JSON."""
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.install:
        environments.install("llama-cpp", args.environments)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(args, Path(scratch))
        told = {key: value for key, value in vars(args).items() if key not in ("install", "environments", "output")}
        tokens = {name: windows.sha256 for name, windows in bench.texts.items()}
        results = {"settings": told, "tokens": tokens, "environment": llmqat.environment(), "rates": {}, "rows": {}}
        compare(bench, results, lambda: write(args.output, results))
        write(args.output, results)
    show(results)


if __name__ == "__main__":
    main()
