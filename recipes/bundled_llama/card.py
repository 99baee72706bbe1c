"""Measure the bundled Llama and write its model card.

    python recipes/bundled_llama/card.py --run runs/bundled_llama --output llmqat/models/bundled/llama

Copies the finished model of `train.py` to --output, with a README.md that tells its data, its training and what
rounding to nearest costs it.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

import torch

import llmqat
from llmqat import QuantScheme

WINDOW, TOKENS = 512, 65536
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def perplexity(directory: Path, data: llmqat.Windows, scheme: QuantScheme | None = None) -> float:
    """Perplexity of the float model, or of its round-to-nearest version."""
    model = llmqat.load_float(str(directory), torch.float32)
    if scheme is not None:
        llmqat.prepare(model, scheme, init="rtn")
    return llmqat.evaluate(model, data).perplexity


def cost_table(directory: Path, data: llmqat.Windows) -> tuple[float, str]:
    """Float perplexity, and rows for round-to-nearest at int4 and int3, groups of 128 and 32."""
    base = perplexity(directory, data)
    rows = []
    for bits in (4, 3):
        for group_size in (128, 32):
            quantized = perplexity(directory, data, QuantScheme(bits, group_size))
            rows.append(f"| int{bits}, group {group_size} | {quantized:.3f} | {quantized / base - 1:+.2%} |")
    return base, "\n".join(rows)


def card(run: Path, directory: Path) -> str:
    """The model card."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["validation_loss"] for row in log if "validation_loss" in row}
    last = log[-1]
    tokenizer = llmqat.load_tokenizer(str(directory))
    corpus = llmqat.load_corpus("stdlib")
    data = llmqat.windows(tokenizer, corpus.test, WINDOW, TOKENS)
    base, rows = cost_table(directory, data)
    model = llmqat.load_float(str(directory))
    curve = ", ".join(f"{step}: {loss:.3f}" for step, loss in losses.items() if step % 300 == 0 or step == last["step"])
    version = ".".join(map(str, sys.version_info[:3]))
    return f"""---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---
# The Llama inside llmqat

A small real Llama, {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters in bfloat16, trained by this
project so that every command runs on a machine with no network. It writes recognisable Python, and nothing else.

- **Data**: the source text of Python {version}'s standard library without test suites and generated tables
  ({sum(map(len, corpus.train)) / 1e6:.2f} M characters in {len(corpus.train)} files for training;
  {len(corpus.validation)} files for validation and {len(corpus.test)} for test were never seen; the split is by file
  name, see `llmqat/data/stdlib.py`). The standard library is under the PSF licence.
- **Tokenizer**: byte-level BPE of {tokenizer.vocab_size} tokens, trained on the same training files.
- **Training**: `recipes/bundled_llama/train.py`, {last["step"]} steps, {last["tokens"]:,} tokens. Validation loss by
  step: {curve}.
- **Perplexity** on {data.tokens:,} tokens of unseen files (windows of {WINDOW} without overlap, one BOS, float32
  compute, ids sha256 {data.sha256[:12]}): **{base:.3f}**.

What rounding its Linear layers to nearest costs (symmetric, signed scale):

| | perplexity | vs float |
|---|---:|---:|
{rows}
"""


def main() -> None:
    """Copy the model and write its card."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, required=True, help="output of train.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the bundled model")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (args.run / "model" / name).exists():
            shutil.copyfile(args.run / "model" / name, args.output / name)
    (args.output / "README.md").write_text(card(args.run, args.output))


if __name__ == "__main__":
    main()
