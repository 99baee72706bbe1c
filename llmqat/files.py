"""Files that appear whole or not at all: written beside, synced, renamed."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llmqat.errors import LlmqatError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial-"


@contextmanager
def replacing(directory: Path, seal: str = "", owned: Sequence[str] = (), first: str = "") -> Iterator[Path]:
    """A scratch directory whose files replace those of the same name in `directory` once the ``with`` ends well.

    Each file appears whole under its final name or not at all; what fails inside leaves `directory` as it was. A
    process that is killed inside leaves the scratch directory behind; `discard_partial` removes it.

    Args:
        directory: made where it is missing.
        seal: name of the file without which the others do not count: it goes first and comes last, so that a directory
            that has one is whole.
        owned: patterns of files that belong to what is written: those of an earlier write go. Read at the end.
        first: name of the file that says whose the others are: it comes before them.

    Raises:
        LlmqatError: if `directory` cannot be written, or the disk is full.
    """
    make_directory(directory)
    with _scratch(directory, "choose another --output") as scratch:
        yield scratch
        _publish(scratch, directory, seal, owned, first)


@contextmanager
def appearing(directory: Path, remedy: str) -> Iterator[Path]:
    """A scratch directory that becomes `directory` once the ``with`` ends well, unless another process was sooner.

    Args:
        directory: must not be there; what it lies in is made where it is missing.
        remedy: what to do where it cannot be written.

    Raises:
        LlmqatError: if it cannot be written, or the disk is full.
    """
    make_directory(directory.parent, remedy)
    with _scratch(directory.parent, remedy) as scratch:
        yield scratch
        for path in scratch.rglob("*"):
            path.chmod(_mode(path))
            sync(path)
        scratch.chmod(_mode(scratch))
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
        sync(directory.parent)


@contextmanager
def _scratch(directory: Path, remedy: str) -> Iterator[Path]:
    """A new directory inside `directory`, which goes when the ``with`` ends; what the disk says becomes one line."""
    try:
        scratch = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=directory))
    except OSError as error:
        raise LlmqatError(f"cannot write to {directory}: {error.strerror}; {remedy}") from error
    try:
        yield scratch
    except Exception as error:
        problem = storage_problem(error)
        if problem is None:
            raise
        raise LlmqatError(f"cannot write to {directory}: {problem}; free some space, or {remedy}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def make_directory(directory: Path, remedy: str = "choose another --output") -> list[Path]:
    """Make `directory`, and what it lies in; returns what was made, outermost first.

    Raises:
        LlmqatError: if that is not possible.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise LlmqatError(f"output {directory} is a file; choose a directory")
        missing = [path for path in (directory, *directory.parents) if not path.exists()]
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LlmqatError(f"cannot write to {directory}: {error.strerror}; {remedy}") from error
    return missing[::-1]


def _publish(scratch: Path, directory: Path, seal: str, owned: Sequence[str], first: str) -> None:
    """Rename what is in `scratch` into `directory`; only once all of it is on the disk."""
    names = sorted(path.relative_to(scratch) for path in scratch.rglob("*") if path.is_file())
    for name in names:
        (scratch / name).chmod(_mode(scratch / name))  # safetensors makes its files private
        sync(scratch / name)
    if seal:
        (directory / seal).unlink(missing_ok=True)
    for path in [path for pattern in owned for path in directory.glob(pattern)]:
        if path.relative_to(directory) not in names:
            path.unlink(missing_ok=True)
    for name in sorted(names, key=lambda name: (name == Path(seal), name != Path(first))):
        (directory / name).parent.mkdir(exist_ok=True)
        os.replace(scratch / name, directory / name)
    sync(directory)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no directories
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _mode(path: Path) -> int:
    """Permissions of a file, or directory, under this process's umask, as if it had been made anew."""
    umask = os.umask(0)
    os.umask(umask)
    return (0o777 if path.is_dir() else 0o666) & ~umask


def storage_problem(error: BaseException) -> str | None:
    """The message of the disk, if it is the cause of `error`: safetensors and torch wrap it in others."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    wrapped = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
    if wrapped:
        return os.strerror(int(wrapped[1]))
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):  # torch.save
        return storage_problem(error.__context__)
    return None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other processes out of an existing `directory`; ends with the process, however it ends.

    Raises:
        LlmqatError: if another one is in it.
    """
    if fcntl is None:
        yield
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise LlmqatError(f"cannot read {directory}: {error.strerror}; choose another --output") from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise LlmqatError(
                f"another process is writing to {directory}; wait until it is done, or choose another --output"
            ) from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def discard_partial(directory: Path, folders: Sequence[str]) -> None:
    """Remove what processes that were killed while they wrote left in `folders` of `directory`, and nowhere else."""
    for folder in (directory / name for name in folders):
        if folder.is_symlink() and folder != directory:
            continue
        for scratch in list(folder.glob(f"{PARTIAL}*")):
            if not scratch.is_symlink():
                shutil.rmtree(scratch, ignore_errors=True)


def sealed_json(values: dict[str, Any]) -> str:
    """`values` as JSON, with the SHA-256 of the rest under ``"sha256"``."""
    return json.dumps({**values, "sha256": _digest(values)})


def read_sealed_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """The values that `sealed_json` sealed; None if there is no such file.

    Raises:
        LlmqatError: if the file is damaged, or nobody sealed it, with the `remedy`.
    """
    if not path.exists():
        return None
    values = None
    try:
        values = json.loads(path.read_text("utf-8")) if path.is_file() else None
        digest = values.pop("sha256") if isinstance(values, dict) else ""
        sound = isinstance(values, dict) and digest == _digest(values)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        sound = False
    if not sound or not isinstance(values, dict):
        raise LlmqatError(f"{path} is damaged, or was written by another version of llmqat; {remedy}")
    return values


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
