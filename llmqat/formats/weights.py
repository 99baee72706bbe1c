"""The safetensors files of a model directory: which they are, and what they hold. Everything they say is checked."""

import json
from collections.abc import Iterator
from pathlib import Path, PurePath

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.mapped import mapped_tensors
from llmqat.models.stored import Header, headers

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "copy it again, or write the model again"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, in order.

    Raises:
        LlmqatError: if there are none, some are missing or lie outside the directory, or one model lies over another.
    """
    index = directory / INDEX
    if index.exists() and (directory / WEIGHTS).exists():
        raise LlmqatError(
            f"{directory} holds {WEIGHTS} and {INDEX}, the weights of two models; remove the one that is not meant"
        )
    names = sorted(set(_weight_map(index).values())) if index.exists() else [WEIGHTS]
    return [_inside(directory, name) for name in names]


def _weight_map(index: Path) -> dict[str, str]:
    """Which tensor is in which file, as the index says."""
    try:
        weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
        if all(isinstance(name, str) for name in weight_map.values()) and weight_map:
            return dict(weight_map)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise LlmqatError(f"{index} is damaged; {AGAIN}")


def _inside(directory: Path, name: str) -> Path:
    """The file `name` of a directory; a link may only lead to where the Hub's cache keeps what it downloaded."""
    if name != PurePath(name).name or "\\" in name or "\0" in name or not name.endswith(".safetensors"):
        raise LlmqatError(f"{directory / INDEX} names {name!r}, which is no safetensors file of its directory; {AGAIN}")
    path = directory / name
    if not path.exists():
        raise LlmqatError(f"{directory} lacks {name}; copy the directory again, or write the model again")
    home = directory.resolve()
    kept = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    if path.resolve().parent not in (home, kept):
        raise LlmqatError(
            f"{path} is a link that leaves its directory, to {path.resolve()}; put a copy of the file in its place"
        )
    return path


def tensor_headers(directory: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor of a model by its name in the file; no tensor is read.

    Raises:
        LlmqatError: see `weight_files`; or if a file is damaged, two hold one tensor, or the index says otherwise.
    """
    found: dict[str, Header] = {}
    home: dict[str, str] = {}
    for path in weight_files(directory):
        try:
            own = headers(path)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error
        twice = sorted(own.keys() & found.keys())
        if twice:
            raise LlmqatError(f"{directory} holds {twice[0]} twice, in {home[twice[0]]} and {path.name}; {AGAIN}")
        found |= own
        home |= dict.fromkeys(own, path.name)
    if (directory / INDEX).exists():
        said = _weight_map(directory / INDEX)
        wrong = sorted(name for name in said.keys() | home.keys() if said.get(name) != home.get(name))
        if wrong:
            raise LlmqatError(
                f"{directory / INDEX} says that {wrong[0]} is in {said.get(wrong[0], 'no file')}, but it is in "
                f"{home.get(wrong[0], 'none')}; {AGAIN}"
            )
    return found


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model, one at a time.

    Raises:
        LlmqatError: if a file is missing or truncated.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def read_mapped(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model, mapped.

    Raises:
        LlmqatError: if a file is missing or truncated.
    """
    for path in weight_files(directory):
        try:
            yield from mapped_tensors(path).items()
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> LlmqatError:
    return LlmqatError(f"{path} is damaged ({error}); {AGAIN}")
