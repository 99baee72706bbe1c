"""Training state on disk: one file, written beside and renamed, so that an interrupted save costs nothing."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from llmqat.errors import LlmqatError

NAME = "checkpoint.pt"


def save(directory: Path, state: dict[str, Any]) -> None:
    """Replace the checkpoint of `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / (NAME + ".partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(directory / NAME)


def load(directory: Path) -> dict[str, Any] | None:
    """The checkpoint of `directory`, or None if there is none.

    Raises:
        LlmqatError: if the file cannot be read.
    """
    path = directory / NAME
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises pickle, zip and runtime errors alike
        raise LlmqatError(f"{path} is damaged; delete it and start again without --resume") from error
    return state


def discard(directory: Path) -> None:
    """Forget an earlier run's training state."""
    shutil.rmtree(directory, ignore_errors=True)
