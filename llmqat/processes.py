"""Which process this is, where `accelerate launch`, torchrun or mpirun started several. Alone, it is the first."""

import os

from llmqat.errors import LlmqatError

_INDEX = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
_LOCAL_INDEX = ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK")  # in accelerate's order
_LOCAL_COUNT = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE")
_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # read by accelerate and torch


def process_index() -> int:
    """Index of this process among all, over all machines.

    Raises:
        LlmqatError: if the environment tells anything but a number.
    """
    return next((_number(name) for name in _INDEX if name in os.environ), 0)


def process_count() -> int:
    """How many processes there are, over all machines.

    Raises:
        LlmqatError: if the environment tells anything but a number.
    """
    return next((_number(name) for name in _COUNT if name in os.environ), 1)


def local_index() -> int:
    """Index of this process among those on its machine; devices are handed out by it.

    Raises:
        LlmqatError: if the environment tells anything but a number.
    """
    return next((_number(name) for name in _LOCAL_INDEX if name in os.environ), 0)


def local_count() -> int:
    """How many processes there are on this machine; all of them, if the environment does not tell.

    Raises:
        LlmqatError: if the environment tells anything but a number.
    """
    return next((_number(name) for name in _LOCAL_COUNT if name in os.environ), process_count())


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return process_index() == 0


def check_environment() -> None:
    """Refuse an environment in which this process is none of those that it tells of.

    Raises:
        LlmqatError: naming the variable and its value.
    """
    index, count = process_index(), process_count()
    for name in _LOCAL:
        if name in os.environ:
            _number(name)
    if index >= count and any(name in os.environ for name in _COUNT):
        raise LlmqatError(
            f"this process has index {index} of {count}, by the environment; launch by accelerate, or unset "
            f"{' and '.join(name for name in (*_INDEX, *_COUNT) if name in os.environ)}"
        )


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise LlmqatError(
            f"the environment variable {name} must be a whole number, got {text[:40]!r}; unset it, or launch by "
            "accelerate or torchrun, which set it"
        )
    return int(text)
