"""llmqat beside the usual ways to shrink and fine-tune with bitsandbytes: QLoRA and LLM.int8.

    python eval/baselines.py --model llama --max-steps 200
    python eval/baselines.py --model llama --dataset chats.jsonl --max-steps 200 --output eval/results/baselines.json

Every row has the same model, training tokens, steps, batch and test tokens; training is by cross-entropy on what
counts (answers, for conversations). Rows: the float model, and with an ordinary LoRA; llmqat's GPTQ, and LoRA inside
its quantizer, packed (4.125 bits per weight in groups of 128); an NF4 base of bitsandbytes (double quantization, 4.127
bits) without and with an ordinary LoRA beside it (QLoRA, arXiv 2305.14314), and with that LoRA merged into NF4, which
is what a model of 4 bits takes; LLM.int8 (arXiv 2208.07339). A LoRA of peft's trains under `transformers.Trainer`; of
the learning rates given for each, the one with the least held-out loss counts. Runs on a CPU; needs
`pip install 'llmqat[bitsandbytes]'`.
"""

import argparse
import copy
import json
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

import llmqat
from llmqat import QuantScheme

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)  # codes, an 8-bit scale per 64, and a float32 scale per 256 of those
SHOWN = ("perplexity", "kl_to_float", "top1_agreement", "bits", "lr", "seconds")


@dataclass
class Bench:
    """What every row shares."""

    args: argparse.Namespace
    directory: str
    tokenizer: Any
    rows: Tensor
    held_out: llmqat.Windows
    test: llmqat.Windows
    calibration: list[Tensor]
    reference: llmqat.FloatCopy
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, args: argparse.Namespace, directory: str) -> "Bench":
        """Model, data and calibration of a comparison; the model is saved to `directory`, for transformers to load."""
        model = llmqat.load_float(args.model, torch.float32)
        tokenizer, corpus = llmqat.load_tokenizer(args.model), llmqat.load_corpus(args.dataset)
        model.save_pretrained(directory)
        wanted = args.max_steps * args.batch_size
        rows = llmqat.sequences(tokenizer, corpus.train, args.length, limit=wanted * args.length * 2)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:wanted]
        stream = llmqat.encode(tokenizer, corpus.train, 64 * args.length)
        calibration = llmqat.split_stream(stream, args.length, "calibration")
        return cls(
            args,
            directory,
            tokenizer,
            rows[order],
            llmqat.windows(tokenizer, corpus.validation, args.length, 16384),
            llmqat.windows(tokenizer, corpus.test, args.length, args.eval_tokens),
            list(calibration[: max(1, len(calibration) // 8) * 8].split(8)),
            llmqat.FloatCopy(model),
        )

    def score(self, name: str, model: Any, bits: float, started: float, **more: Any) -> None:
        """Measure a model, print its row, keep it."""
        result = llmqat.evaluate(model, self.test, self.reference, name)
        row = {
            "perplexity": result.perplexity,
            "kl_to_float": result.kl_to_float,
            "top1_agreement": result.top1_agreement,
            "bits": bits,
            "seconds": time.perf_counter() - started,
            **more,
        }
        self.results[name] = row
        print(f"{name:<28}" + "".join(_cell(row.get(key)) for key in SHOWN), flush=True)

    def load_base(self, quantization: BitsAndBytesConfig | None) -> Any:
        """The float model again, as bitsandbytes quantizes it."""
        kwargs = {"quantization_config": quantization} if quantization else {}
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            self.directory, dtype=torch.float32, device_map={"": device}, **kwargs
        )
        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # Its inference layout for such CPUs rounds scales to bfloat16, and peft cannot merge into it.
                module.support_avx512bf16_for_cpu = False
        return model

    def train_lora(self, base: Any, lr: float) -> Any:
        """An ordinary LoRA on all linears of the blocks, trained by transformers; the trained model."""
        config = LoraConfig(
            r=self.args.lora_r, lora_alpha=self.args.lora_r, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        torch.manual_seed(0)
        model = get_peft_model(base, config)
        pairs = [row if row.ndim == 2 else (row, row) for row in self.rows]
        arguments = TrainingArguments(
            f"{self.directory}/trainer",
            max_steps=self.args.max_steps,
            per_device_train_batch_size=self.args.batch_size,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, self.args.max_steps // 20),
            adam_beta2=0.95,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        Trainer(model, arguments, train_dataset=[{"input_ids": i, "labels": label} for i, label in pairs]).train()
        return model.eval()


def _cell(value: float | None) -> str:
    return f"{'':>16}" if value is None else f"{value:>16.5g}"


def nf4() -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantization, as in the QLoRA paper; float32 compute."""
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def best_of(bench: Bench, rates: list[float], train: Callable[[float], Any]) -> tuple[Any, float]:
    """The model with the least held-out loss over the learning rates, and its rate."""
    trained = []
    for lr in rates:
        model = train(lr)
        trained.append(
            (llmqat.evaluate(model, bench.held_out, description=f"held-out, lr {lr:g}").perplexity, lr, model)
        )
    _, lr, model = min(trained, key=lambda entry: entry[0])
    return model, lr


def adapter_bits(model: Any) -> float:
    """Bits of the adapter in bfloat16, per weight it is added to."""
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    adapter = sum(p.numel() for layer in layers for part in (layer.lora_A, layer.lora_B) for p in part.parameters())
    return 16 * adapter / sum(layer.in_features * layer.out_features for layer in layers)


def bitsandbytes_rows(bench: Bench) -> None:
    """LoRA on float, NF4, QLoRA, QLoRA merged, LLM.int8."""
    args = bench.args
    started = time.perf_counter()
    model, lr = best_of(bench, args.lr, lambda lr: bench.train_lora(bench.load_base(None), lr))
    bench.score("float + LoRA", model, 16 + adapter_bits(model), started, lr=lr)
    started = time.perf_counter()
    bench.score("NF4", bench.load_base(nf4()), NF4_BITS, started)
    started = time.perf_counter()
    model, lr = best_of(bench, args.lr, lambda lr: bench.train_lora(qlora_base(bench), lr))
    bench.score("NF4 + LoRA (QLoRA)", model, NF4_BITS + adapter_bits(model), started, lr=lr)
    bench.score("NF4 + LoRA, merged into NF4", model.merge_and_unload(), NF4_BITS, started, lr=lr)
    started = time.perf_counter()
    int8 = bench.load_base(BitsAndBytesConfig(load_in_8bit=True))
    bench.score("LLM.int8", int8, 8 + 32 / bench.reference.model.config.hidden_size, started)


def qlora_base(bench: Bench) -> Any:
    """The NF4 model, ready for an adapter."""
    return prepare_model_for_kbit_training(bench.load_base(nf4()), use_gradient_checkpointing=False)


def llmqat_rows(bench: Bench) -> None:
    """GPTQ, and LoRA inside the quantizer from there: both packed, loaded and run by the kernel op."""
    args = bench.args
    started = time.perf_counter()
    start = copy.deepcopy(bench.reference.model)
    scheme = QuantScheme(4, args.group_size)
    llmqat.prepare(start, scheme, init="gptq", calibration=bench.calibration, keep_float=True)
    bits = 4 + 16 / args.group_size
    bench.score("llmqat GPTQ", packed(start), bits, started)

    def train(lr: float) -> Any:
        model = llmqat.add_lora(copy.deepcopy(start), r=args.lora_r)
        options = {
            "max_steps": args.max_steps,
            "batch_size": args.batch_size,
            "precision": "fp32",
            "lr": lr,
        }
        llmqat.finetune(model, bench.rows, bench.held_out.ids, mode="lora", **options)
        return model

    model, lr = best_of(bench, args.llmqat_lr, train)
    bench.score("llmqat LoRA, packed", packed(model), bits, started, lr=lr)


def packed(model: Any) -> Any:
    """The model as it ships."""
    with tempfile.TemporaryDirectory() as directory:
        llmqat.pack(model, directory)
        return llmqat.load(directory, torch.float32)


def main() -> None:
    """Run all rows, print them, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="llama", help="directory, Hub id or llama")
    parser.add_argument("--dataset", default="stdlib", help="as in llmqat finetune")
    parser.add_argument("--max-steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="tokens per sequence and window")
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--lora-r", type=int, default=32)
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-4, 1e-3], help="learning rates of peft's LoRA")
    parser.add_argument("--llmqat-lr", type=float, nargs="+", default=[3e-3, 1e-2], help="of llmqat's, in codes")
    parser.add_argument("--eval-tokens", type=int, default=65536)
    parser.add_argument("--output", type=Path, default=Path("eval/results/baselines.json"))
    args = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench.load(args, directory)
        print(f"{'':<28}" + "".join(f"{key:>16}" for key in SHOWN))
        bench.score("float", bench.reference.model, 16, time.perf_counter())
        llmqat_rows(bench)
        bitsandbytes_rows(bench)
    result = {
        "environment": llmqat.environment(),
        "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "tokens": {"train": args.max_steps * args.batch_size * args.length, "eval": bench.test.tokens},
        "eval": bench.test.protocol,
        "eval_sha256": bench.test.sha256,
        "rows": bench.results,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
