"""llama.cpp by llama-cpp-python. It rounds the activations of layers in Q blocks to int8, 32 at a time."""

from pathlib import Path
from typing import Any

import numpy as np

from .run_passages import log_softmax


class LlamaCpp:
    """A GGUF file in llama.cpp."""

    def __init__(self, file: Path, context: int) -> None:
        from llama_cpp import Llama

        self.llama = Llama(str(file), n_ctx=context, logits_all=True, verbose=False)

    def tokens(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = self.llama.tokenize(text.encode(), special=True)
        return ids

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """Tokens that continue `ids`; the loop has no end of its own."""
        self.llama.reset()
        steps = self.llama.generate(ids, temp=0.0, repeat_penalty=1.0)
        return [int(token) for _, token in zip(range(new), steps, strict=False)]

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens, from one batch."""
        self.llama.reset()
        self.llama.eval(ids)
        return log_softmax(self.llama.scores[: len(ids) - 1])


def load(directory: str, job: dict[str, Any]) -> LlamaCpp:
    """The file of a directory."""
    return LlamaCpp(Path(directory) / job["gguf"], job["context"])
