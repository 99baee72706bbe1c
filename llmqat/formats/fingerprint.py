"""Hashes of what was trained, written beside the packed file so that it can be proved to hold the same."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.models.patcher import quantized_layers

NAME = "fingerprint.json"
Grid = tuple[Tensor, Tensor, Tensor | None]


def sha256(tensor: Tensor | None) -> str | None:
    """Hash of a tensor's bytes; None for None."""
    if tensor is None:
        return None
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def grids_of(model: nn.Module) -> dict[str, Grid]:
    """Codes, stored scale and zero point of every layer that is not on meta, as the model's own forward uses them."""
    return {
        on_grid.name: (on_grid.codes(), on_grid.layer.stored_scale(), on_grid.layer.stored_zero_point())
        for on_grid in quantized_layers(model)
        if not on_grid.layer.weight.is_meta
    }


def fingerprint(model: nn.Module) -> dict[str, dict[str, str | None]]:
    """Hashes of `grids_of`, and of the scales of static activations, by layer."""
    layers: dict[str, dict[str, str | None]] = {
        name: {"codes": sha256(codes), "scale": sha256(scale), "zero_point": sha256(zero_point)}
        for name, (codes, scale, zero_point) in grids_of(model).items()
    }
    for on_grid in quantized_layers(model):
        if on_grid.layer.scheme.act_static:
            layers[on_grid.name]["input_scale"] = sha256(on_grid.layer.stored_act_scale())
    return layers


def read(directory: Path) -> dict[str, dict[str, str | None]]:
    """The fingerprint beside a packed model.

    Raises:
        LlmqatError: if there is none.
    """
    path = directory / NAME
    if not path.exists():
        raise LlmqatError(
            f"{directory} has no {NAME}: it was not written by llmqat, so there is nothing to prove it against"
        )
    try:
        layers: dict[str, dict[str, str | None]] = json.loads(path.read_text())["layers"]
    except (ValueError, KeyError, TypeError) as error:
        raise LlmqatError(f"{path} is damaged; copy it again, or write the model again") from error
    return layers


def write(directory: Path, layers: dict[str, dict[str, str | None]]) -> None:
    """Write a fingerprint to `directory`."""
    (directory / NAME).write_text(json.dumps({"format": 1, "layers": layers}, indent=1))
