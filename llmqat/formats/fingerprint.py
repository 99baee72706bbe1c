"""Hashes of what was trained and of what was written, kept beside the file so that it can be proved to hold both.

`layers` is derived from the model that was trained, before anything is packed; `tensors` and `files` from what was
written: every tensor by its name, dtype, shape and bytes, and every byte of every file.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.mapped import release

NAME, FORMAT = "fingerprint.json", 2
CHUNK_BYTES = 1 << 22
Layers = dict[str, dict[str, str | None]]


@dataclass(frozen=True)
class Fingerprint:
    """The values of fingerprint.json.

    Attributes:
        layers: hashes of codes, scale, zero point and input scale, by layer.
        tensors: dtype, shape and hash of every tensor, by its name in the file.
        files: hash of every file of the model, by its name.
    """

    layers: Layers
    tensors: dict[str, str]
    files: dict[str, str]


def sha256(tensor: Tensor | None) -> str | None:
    """Hash of a tensor's bytes; None for None."""
    if tensor is None:
        return None
    raw = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    digest = hashlib.sha256(raw.numpy().data).hexdigest()
    release(tensor)
    return digest


def sha256_of_file(path: Path) -> str:
    """Hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def tensor_hashes(state: dict[str, Tensor]) -> dict[str, str]:
    """Dtype, shape and hash of every tensor in `state`, in one word each."""
    return {name: f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}:{sha256(t)}" for name, t in state.items()}


def layer_hashes(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, input_scale: Tensor | None
) -> dict[str, str | None]:
    """Hashes of one layer on the grid, by what they are of: codes ``(out, in)``, scale and zero point as stored, and
    the scale of static activations where there is one."""
    hashes = {"codes": sha256(codes), "scale": sha256(scale), "zero_point": sha256(zero_point)}
    return hashes if input_scale is None else hashes | {"input_scale": sha256(input_scale)}


def exists(directory: Path) -> bool:
    """Whether a fingerprint of this version lies in `directory`."""
    path = directory / NAME
    return path.exists() and '"format": 1,' not in path.read_text("utf-8", "replace")[:20]


def read(directory: Path) -> Fingerprint:
    """The fingerprint beside a packed model.

    Raises:
        LlmqatError: if there is none, it is damaged, or an earlier version of llmqat wrote it.
    """
    path = directory / NAME
    if not path.exists():
        raise LlmqatError(
            f"{directory} has no {NAME}: it was not written by llmqat, so there is nothing to prove it against"
        )
    damaged = f"{path} is damaged; copy it again, or write the model again"
    try:
        text = path.read_text("utf-8")
        values: Any = json.loads(text)
        if not isinstance(values, dict) or values.get("format") not in (1, FORMAT):
            raise LlmqatError(damaged)
        if values["format"] == 1:
            raise LlmqatError(
                f"{path} is of an earlier llmqat, which left out embeddings, norms and configs; write the model again, "
                "or verify it against the trained model (Python: llmqat.verify(directory, against=model))"
            )
        found = Fingerprint(*(dict(values[key]) for key in ("layers", "tensors", "files")))
        if text != _text(found) or not all(isinstance(layer, dict) for layer in found.layers.values()):
            raise LlmqatError(damaged)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise error if isinstance(error, LlmqatError) else LlmqatError(damaged) from error
    return found


def write(directory: Path, layers: Layers, tensors: dict[str, str]) -> None:
    """Write a fingerprint to `directory`, after all the files that it covers: those that lie there now."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != NAME)
    files = {path.relative_to(directory).as_posix(): sha256_of_file(path) for path in paths}
    (directory / NAME).write_text(_text(Fingerprint(layers, tensors, files)), "utf-8")


def _text(found: Fingerprint) -> str:
    """The file, to the byte; ``seal`` is a hash of the rest, so that a change anywhere in it shows."""
    values = {"format": FORMAT, **asdict(found)}
    seal = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return json.dumps({**values, "seal": seal}, indent=1)
