"""Peak memory of a block of 128 experts, as Qwen3-30B-A3B has 48 of: quantized, trained with LoRA, packed, decoding.

    python eval/expert_memory.py --output eval/results/expert_memory.json

Random weights in bfloat16 and a small vocabulary; GPTQ at 4 bits on 8 x 256 tokens, a step of LoRA, one packed file, 16
tokens decoded from it. All of it is in one process; a stage's figure is the peak of resident memory up to its end.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import llmqat
from llmqat import QuantScheme

SHAPE = dict(
    vocab_size=1024,
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_experts=128,
    num_experts_per_tok=8,
    num_hidden_layers=1,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    max_position_embeddings=1024,
)
SEQUENCES, LENGTH, NEW_TOKENS, RANK = 8, 256, 16, 8
LIMIT_GB = 8


class Stages:
    """Seconds of each stage, and the peak of resident memory in bytes up to its end."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}
        self.start = time.perf_counter()

    def end(self, name: str) -> None:
        """Note the stage that ends here."""
        peak, now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, time.perf_counter()
        self.found[name] = {"seconds": round(now - self.start, 1), "peak": peak}
        print(f"{name}: {now - self.start:.0f} s, peak {peak / 1e9:.2f} GB", flush=True)
        self.start = now


def run(directory: Path) -> dict[str, dict[str, float]]:
    """Take the model on its way."""
    torch.manual_seed(0)
    stages = Stages()
    config = Qwen3MoeConfig(**SHAPE)
    with torch.device("meta"):
        empty = Qwen3MoeForCausalLM(config)
    model: Any = empty.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False).eval()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02) if parameter.ndim > 1 else parameter.fill_(1)
    stages.end("made")
    ids = torch.randint(SHAPE["vocab_size"], (SEQUENCES, 1, LENGTH))
    llmqat.prepare(model, QuantScheme(4, 128), init="gptq", calibration=list(ids), storage_dtype=torch.bfloat16)
    stages.end("quantized")
    model = llmqat.add_lora(model, RANK)
    llmqat.finetune(model, ids[:4, 0], ids[4:, 0], max_steps=1, batch_size=1, mode="lora")
    stages.end("trained")
    llmqat.pack(model, directory)
    del model
    stages.end("packed")
    packed = llmqat.load(directory)
    out = packed.generate(ids[0, :, :16], max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
    assert out.shape == (1, 16 + NEW_TOKENS)
    stages.end("decoded")
    return stages.found


def main() -> None:
    """Measure, print a line per stage, write the JSON; fail above the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("eval/results/expert_memory.json"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        stages = run(Path(scratch) / "packed")
    result = {"environment": llmqat.environment(), "shape": SHAPE, "tokens": SEQUENCES * LENGTH, "stages": stages}
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    peak = max(stage["peak"] for stage in stages.values())
    if peak > LIMIT_GB * 1e9:
        raise SystemExit(f"peak of {peak / 1e9:.2f} GB, and {LIMIT_GB} GB are allowed")


if __name__ == "__main__":
    main()
