"""GPTQModel, on the kernel that it chooses for this machine."""

from typing import Any

from .torch_model import TorchModel


def load(directory: str, job: dict[str, Any]) -> TorchModel:
    """The model as `GPTQModel.load` loads it."""
    import torch
    from gptqmodel import GPTQModel

    model = GPTQModel.load(directory, device="cpu", dtype=getattr(torch, job["dtype"]))
    return TorchModel(model.model, model.tokenizer)
