"""Run an exported model in the engine that it is for, beside the packed model it was made of.

    python eval/engines.py PACKED EXPORTED       # prints a row of the table in docs/serve.md

The engine is found by what lies in EXPORTED and has to be installed: `llama-cpp-python` for model.gguf, `mlx-lm` for
MLX, `gptqmodel` and `optimum` for GPTQ and AWQ, transformers for a dense model. Compared are the tokens of prompts,
greedy continuations, and log-probabilities of the packed model's own continuations in float32. Engines that round
activations to int8, as llama.cpp does for blocks on a grid, differ by that.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

import llmqat

PROMPTS = (
    "def read_lines(path):\n",
    "import os\n\nclass A",
    "The capital of France is",
    "for i in range(10",
    "Once upon a time, 3456 of them",
)


class LlamaCpp:
    """llama.cpp by llama-cpp-python."""

    package = "llama-cpp-python"

    def __init__(self, directory: Path) -> None:
        from llama_cpp import Llama

        self.llama = Llama(str(directory / "model.gguf"), n_ctx=512, logits_all=True, verbose=False)

    def tokens(self, text: str) -> list[int]:
        """Ids of a prompt."""
        return self.llama.tokenize(text.encode(), special=True)

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """A prompt with its continuation."""
        self.llama.reset()
        steps = zip(range(new), self.llama.generate(ids, temp=0.0, repeat_penalty=1.0), strict=False)
        return ids + [int(token) for _, token in steps]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits ``(length, vocabulary)``."""
        self.llama.reset()
        self.llama.eval(ids)
        return torch.from_numpy(np.array(self.llama.scores[: len(ids)]))


class Transformers:
    """transformers, for what its own code loads."""

    package = "transformers"

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)

    def tokens(self, text: str) -> list[int]:
        """Ids of a prompt."""
        return self.tokenizer(text)["input_ids"]

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """A prompt with its continuation."""
        return greedy(self.model, ids, new)

    @torch.no_grad()
    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits ``(length, vocabulary)``."""
        return self.model(torch.tensor([ids])).logits[0]


class GptqModel(Transformers):
    """GPTQModel, which transformers runs GPTQ and AWQ checkpoints with."""

    package = "gptqmodel"


class Mlx:
    """MLX by mlx-lm, in float32."""

    package = "mlx-lm"

    def __init__(self, directory: Path) -> None:
        import mlx.core as mx
        from mlx_lm import load

        self.mx = mx
        self.model, self.tokenizer = load(str(directory))
        self.model.set_dtype(mx.float32)

    def tokens(self, text: str) -> list[int]:
        """Ids of a prompt."""
        return self.tokenizer.encode(text)

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """A prompt with its continuation."""
        from mlx_lm.generate import generate_step

        return ids + [int(token) for token, _ in generate_step(self.mx.array(ids), self.model, max_tokens=new)]

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits ``(length, vocabulary)``."""
        return torch.from_numpy(np.array(self.model(self.mx.array([ids]))[0]))


def engine_of(directory: Path) -> type:
    """The engine that a directory is for."""
    if (directory / "model.gguf").exists():
        return LlamaCpp
    config = json.loads((directory / "config.json").read_text("utf-8"))
    if "quantization" in config:
        return Mlx
    return GptqModel if "quantization_config" in config else Transformers


def greedy(model, ids: list[int], new: int) -> list[int]:
    """A prompt with its greedy continuation by a transformers model, to its end whatever token says so."""
    prompt = torch.tensor([ids])
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[0].tolist()


def main() -> None:
    """Print one row: engine, version, tokens, greedy continuations, KL, top-1 and perplexity."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("packed")
    parser.add_argument("exported", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    args = parser.parse_args()
    ours, tokenizer = llmqat.load(args.packed, dtype=torch.float32), llmqat.load_tokenizer(args.packed)
    engine = engine_of(args.exported)(args.exported)
    same_ids = same_text = 0
    kl, top1, losses = [], [], []
    for prompt in PROMPTS:
        ids = tokenizer(prompt)["input_ids"]
        same_ids += engine.tokens(prompt) == ids
        right = greedy(ours, ids, args.new_tokens)
        same_text += engine.greedy(ids, args.new_tokens) == right
        with torch.no_grad():
            p = ours(torch.tensor([right])).logits[0].double().log_softmax(-1)
        q = engine.logits(right).double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum(-1).tolist()
        top1 += (p.argmax(-1) == q.argmax(-1)).tolist()
        losses.append([-float(x[:-1].gather(1, torch.tensor(right[1:])[:, None]).mean()) for x in (p, q)])
    perplexities = np.exp(np.mean(losses, 0))
    print(
        f"| {engine.package} {version(engine.package)} | {same_ids}/{len(PROMPTS)} | {same_text}/{len(PROMPTS)} | "
        f"{np.mean(kl):.1e} | {np.mean(top1):.1%} | {perplexities[1] / perplexities[0] - 1:+.2%} |"
    )


if __name__ == "__main__":
    main()
