"""Training state on disk, written beside and renamed, so that an interrupted save costs nothing."""

import shutil
from pathlib import Path
from typing import Any

import torch

from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.processes import is_first

NAME = "checkpoint.pt"


def save(directory: Path, state: dict[str, Any], name: str = NAME) -> None:
    """Replace the checkpoint of `directory`.

    Raises:
        LlmqatError: if it cannot be written; the earlier one is untouched.
    """
    with replacing(directory) as scratch, (scratch / name).open("wb") as file:
        torch.save(state, file)


def load(directory: Path, name: str = NAME) -> dict[str, Any] | None:
    """The checkpoint of `directory`, or None if there is none.

    Raises:
        LlmqatError: if the file cannot be read.
    """
    path = directory / name
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


class SavedBlocks:
    """States by block index, a file each: what GPTQ has finished survives the process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def get(self, index: int) -> dict[str, Any] | None:
        """What was put for a block, or None."""
        return load(self.directory, f"block-{index:05d}.pt")

    def put(self, index: int, state: dict[str, Any]) -> None:
        """Write the state of a finished block; of several processes, which all find the same, the first does."""
        if is_first():
            save(self.directory, state, f"block-{index:05d}.pt")
