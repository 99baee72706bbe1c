"""Run the passages of a job through one engine, in the Python of the engine's environment."""

import importlib
import statistics
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np

LOG_PROBABILITIES = "log_probabilities.npz"


class Model(Protocol):
    """One model in one engine."""

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the engine adds."""

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """`new` tokens that continue `ids`, each the likeliest one, by the engine's own loop with its cache."""

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens ``(len(ids) - 1, vocabulary)``, behind all of `ids` but the last."""


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Ids and greedy continuations of the passages of a job, and how many tokens a second the engine found, median over
    the passages; their log-probabilities go into the folder."""
    model: Model = importlib.import_module(f".{job['file']}", __package__).load(job["directory"], job)
    greedy, seconds = [], []
    for ids in job["ids"]:
        began = time.perf_counter()
        greedy.append(model.greedy(ids[: job["prompt"]], job["new"]))
        seconds.append(time.perf_counter() - began)
    said = {
        "ids": [model.tokens(text) for text in job["texts"]],
        "greedy": greedy,
        "tokens_s": job["new"] / statistics.median(seconds),
    }
    np.savez(folder / LOG_PROBABILITIES, *(model.log_probabilities(ids) for ids in job["ids"]))
    return said


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities of logits ``(n, vocabulary)``, in float64 and then float32."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(-1, keepdims=True)
    found: np.ndarray = (shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))).astype(np.float32)
    return found
