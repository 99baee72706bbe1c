"""Which process this is, where `accelerate launch`, torchrun or mpirun started several. Alone, it is the first."""

import os

_INDEX = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
_COUNT = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def process_index() -> int:
    """Index of this process among all, over all machines."""
    return next((int(os.environ[name]) for name in _INDEX if name in os.environ), 0)


def process_count() -> int:
    """How many processes there are, over all machines."""
    return next((int(os.environ[name]) for name in _COUNT if name in os.environ), 1)


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return process_index() == 0
