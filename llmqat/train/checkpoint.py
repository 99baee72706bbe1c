"""Training state on disk: written beside and renamed, so that an interrupted save costs nothing, and sealed.

A file is an archive of torch whose comment is the SHA-256 of all bytes before it and the key of its run: torch itself
checks nothing, and would go on from a state with a flipped bit, or from that of another run.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

import torch

from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.processes import is_first

NAME = "checkpoint.pt"
# What a run leaves in its checkpoint directory, curves of TensorBoard included; what says that it was begun goes first.
OWN_FILES = ("*.json", NAME, "block-*.pt", "llmqat/events.out.tfevents.*", "llmqat/hparams.yml")
MARK = b"llmqat sha256 "
SEAL_LENGTH = len(MARK) + 64
REMEDY = "start again with --overwrite"


@dataclass(frozen=True)
class Checkpoints:
    """Where a run keeps its state.

    Attributes:
        directory: made if need be.
        run: key of the run: of its inputs, see `llmqat.pipeline.saved`; states of other runs are refused.
        state: what to go on from; None starts at the beginning.
    """

    directory: Path
    run: str = ""
    state: dict[str, Any] | None = None

    def save(self, state: dict[str, Any], name: str = NAME) -> None:
        """Replace the state `name`.

        Raises:
            LlmqatError: if it cannot be written; the earlier one is untouched.
        """
        with replacing(self.directory) as scratch:
            with (scratch / name).open("wb") as file:
                torch.save(state, file)
            with (scratch / name).open("r+b") as file:
                self._seal(file)

    def load(self, name: str = NAME) -> dict[str, Any] | None:
        """The state `name`, or None if there is none.

        Raises:
            LlmqatError: if the file is damaged, or of another run.
        """
        path = self.directory / name
        if not path.exists():
            return None
        try:
            with path.open("rb") as file:
                sealed = self._is_sealed(file)
            state: Any = torch.load(path, map_location="cpu", weights_only=True) if sealed else None
        except Exception as error:  # torch.load raises pickle, zip and runtime errors alike
            raise LlmqatError(f"{path} is damaged; {REMEDY}") from error
        if not isinstance(state, dict):
            raise LlmqatError(f"{path} is damaged, or of another run or version of llmqat; {REMEDY}")
        return state

    def subdirectory(self, name: str) -> "Checkpoints":
        """Where a part of the run keeps its states: a directory inside this one."""
        return Checkpoints(self.directory / name, self.run)

    def _seal(self, file: BinaryIO) -> None:
        """Append the seal to an archive, as its comment: the last two bytes of an archive are the comment's length."""
        file.seek(-2, 2)
        file.write(SEAL_LENGTH.to_bytes(2, "little"))
        length = file.tell()
        digest = self._digest(file, length)
        file.seek(length)
        file.write(MARK + digest)

    def _is_sealed(self, file: BinaryIO) -> bool:
        length = file.seek(0, 2) - SEAL_LENGTH
        if length < 0:
            return False
        file.seek(length)
        return file.read() == MARK + self._digest(file, length)

    def _digest(self, file: BinaryIO, length: int) -> bytes:
        """SHA-256 of the key of the run and the first `length` bytes of a file, in hexadecimal."""
        digest = hashlib.sha256(self.run.encode())
        file.seek(0)
        while length > 0 and (piece := file.read(min(length, 1 << 22))):
            digest.update(piece)
            length -= len(piece)
        return digest.hexdigest().encode()


class Background:
    """Does one thing at a time in a thread of its own; what goes wrong there is raised here.

    Leaving the ``with`` waits, also after an error: what was begun is finished.
    """

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)
        self.pending: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work`, once what was begun before is done."""
        self.wait()
        self.pending = self.pool.submit(work)

    def wait(self) -> None:
        """Wait until what was begun is done."""
        pending, self.pending = self.pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise what went wrong so far, without waiting."""
        if self.pending is not None and self.pending.done():
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.wait()
        finally:
            self.pool.shutdown()


def discard(directory: Path, names: tuple[str, ...] = OWN_FILES) -> None:
    """Remove the state of an earlier run; files that are not its own stay."""
    for path in [path for name in names for path in directory.glob(name)]:
        with suppress(OSError):
            path.unlink()
    for folder in (directory / "llmqat", directory):
        with suppress(OSError):  # missing, or other files are in it
            folder.rmdir()


class SavedBlocks:
    """States by block index, a file each: what GPTQ has finished survives the process.

    A training state stands on them, and does not hold them: they stay until the run has ended.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints

    def get(self, index: int) -> dict[str, Any] | None:
        """The values that `put` kept for a block, or None."""
        return self.checkpoints.load(self.name(index))

    def put(self, index: int, state: dict[str, Any]) -> None:
        """Write the state of a finished block; of several processes, which all find the same, the first does."""
        if is_first():
            self.checkpoints.save(state, self.name(index))

    def holds(self, count: int) -> bool:
        """Whether so many blocks are there, from the first on."""
        return all((self.checkpoints.directory / self.name(index)).exists() for index in range(count))

    def present(self) -> list[str]:
        """Names of the files that are there."""
        return sorted(path.name for path in self.checkpoints.directory.glob("block-*.pt"))

    def name(self, index: int) -> str:
        """Name of the file of a block."""
        return f"block-{index:05d}.pt"
