"""llmqat itself: its kernels for a packed directory, and its loader of float models for a dense one."""

from typing import Any

from .torch_model import TorchModel


def load(directory: str, job: dict[str, Any]) -> TorchModel:
    """The model as `llmqat.load`, or `llmqat.load_float`, loads it."""
    import torch

    from llmqat.formats.reader import load_packed
    from llmqat.models.loading import load_float, load_tokenizer

    loader = load_packed if job["format"] == "packed" else load_float
    return TorchModel(loader(directory, dtype=getattr(torch, job["dtype"])), load_tokenizer(directory))
