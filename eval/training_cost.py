"""What a training step through the grid costs, against the same step in float and against torchao's QAT.

    python eval/training_cost.py --output eval/results/training_cost.json

Random-weight Llama of 110 M parameters (768 wide, 12 layers), 4 x 256 tokens, cross-entropy, bfloat16 autocast, float32
masters, fused AdamW. Steps of all variants alternate in one process, so that noise of the machine meets all alike; peak
memory is taken in a process per variant. torchao is optional: its columns are left out where it is not installed.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import llmqat
from llmqat import QuantScheme

SHAPE = dict(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=12,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
)
BATCH, LENGTH, GROUP, RANK = 4, 256, 128, 32
LIMITS = {"time": 1.25, "memory": 1.10}


def float_model() -> LlamaForCausalLM:
    """The float model every variant starts from."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE))


def llmqat_model() -> LlamaForCausalLM:
    """Prepared by llmqat with its defaults."""
    model = float_model()
    llmqat.prepare(model, QuantScheme(bits=4, group_size=GROUP), storage_dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():  # the default recipe trains weights and leaves the grid alone
        parameter.requires_grad_(not name.endswith(".scale"))
    return model


def finetune_random_text(mode: str, shape: tuple[int, int], held_out: int, **options: Any) -> None:
    """Train as `llmqat finetune` would, on random ids ``(sequences, length)``, of which the first are held out too."""
    model: Any = float_model()
    teacher = float_model() if mode == "full" else "self"
    llmqat.prepare(model, QuantScheme(bits=4, group_size=GROUP), storage_dtype=torch.bfloat16)
    if mode == "lora":
        model = llmqat.add_lora(model, r=RANK)
    tokens = torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(1))
    llmqat.finetune(model, tokens, tokens[:held_out], mode=mode, teacher=teacher, **options)


def torchao_model() -> LlamaForCausalLM:
    """Prepared by torchao for int4 weight-only QAT with the same group size; the output head left float."""
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup, quantize_
    from torchao.quantization.qat import QATConfig

    model = float_model()
    base = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(GROUP))

    def in_blocks(module: torch.nn.Module, name: str) -> bool:
        return isinstance(module, torch.nn.Linear) and "lm_head" not in name

    quantize_(model, QATConfig(base, step="prepare"), filter_fn=in_blocks)
    return model


def with_lora(model: LlamaForCausalLM) -> Any:
    """Ordinary LoRA of peft on every Linear of the blocks."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets))


VARIANTS: dict[str, Callable[[], Any]] = {
    "full float": float_model,
    "full llmqat": llmqat_model,
    "lora float": lambda: with_lora(float_model()),
    "lora llmqat": lambda: llmqat.add_lora(llmqat_model(), r=RANK),
}
if find_spec("torchao") is not None:
    VARIANTS["full torchao"] = torchao_model
    VARIANTS["lora torchao"] = lambda: with_lora(torchao_model())


class Stepper:
    """One variant, ready to take training steps."""

    def __init__(self, name: str) -> None:
        self.model = VARIANTS[name]().train()
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-5, fused=True)
        self.trainable = trainable

    def __call__(self, batch: torch.Tensor) -> float:
        """Seconds of one step."""
        started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            loss = self.model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trainable, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - started


def batch() -> torch.Tensor:
    """Random token ids."""
    return torch.randint(SHAPE["vocab_size"], (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))


def peak_bytes(name: str, threads: int, queue: Any) -> None:
    """Peak resident bytes of three steps of one variant, above those of the process before it."""
    torch.set_num_threads(threads)
    with llmqat.peak_memory() as before:
        pass
    with llmqat.peak_memory() as peak:
        step = Stepper(name)
        for _ in range(3):
            step(batch())
    queue.put(peak.bytes - before.bytes)


def measure_memory(threads: int) -> dict[str, int]:
    """`peak_bytes` of every variant, each in a fresh process."""
    context = multiprocessing.get_context("spawn")
    peaks = {}
    for name in VARIANTS:
        queue = context.Queue()
        process = context.Process(target=peak_bytes, args=(name, threads, queue))
        process.start()
        peaks[name] = queue.get()
        process.join()
    return peaks


def measure_time(repeats: int) -> dict[str, list[float]]:
    """Seconds per step of every variant, alternating; two warm-up rounds are dropped."""
    steppers = {name: Stepper(name) for name in VARIANTS}
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for round_ in range(repeats + 2):
        names = list(VARIANTS)
        for name in names if round_ % 2 else reversed(names):
            elapsed = steppers[name](batch())
            if round_ >= 2:
                seconds[name].append(elapsed)
    return seconds


def summarize(seconds: dict[str, list[float]], peaks: dict[str, int]) -> dict[str, Any]:
    """Medians, spreads, and ratios to the float step of the same mode, taken round by round."""
    rows = {}
    for name in VARIANTS:
        mode = name.split()[0]
        ratios = [own / base for own, base in zip(seconds[name], seconds[f"{mode} float"], strict=True)]
        rows[name] = {
            "seconds": statistics.median(seconds[name]),
            "seconds_range": [min(seconds[name]), max(seconds[name])],
            "time_ratio": statistics.median(ratios),
            "time_ratio_range": [min(ratios), max(ratios)],
            "peak_bytes": peaks[name],
            "memory_ratio": peaks[name] / peaks[f"{mode} float"],
        }
    return rows


def main() -> None:
    """Measure, print a table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=9, help="timed steps of each variant (default: 9)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads")
    parser.add_argument("--output", type=Path, default=Path("eval/results/training_cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = summarize(measure_time(args.repeats), measure_memory(args.threads))
    print(f"{'':<14} {'s/step':>8} {'range':>16} {'x float':>8} {'range':>14} {'peak GB':>8} {'x float':>8}")
    for name, r in rows.items():
        low, high = r["seconds_range"]
        ratio_low, ratio_high = r["time_ratio_range"]
        print(
            f"{name:<14} {r['seconds']:8.3f} {f'{low:.3f}..{high:.3f}':>16} {r['time_ratio']:8.3f} "
            f"{f'{ratio_low:.2f}..{ratio_high:.2f}':>14} {r['peak_bytes'] / 1e9:8.2f} {r['memory_ratio']:8.3f}"
        )
    result = {"environment": llmqat.environment(), "shape": SHAPE, "batch": [BATCH, LENGTH], "group_size": GROUP}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**result, "limits": LIMITS, "variants": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
