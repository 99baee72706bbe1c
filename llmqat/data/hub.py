"""Rows of datasets that the library datasets reads: of the Hub, and those that ``save_to_disk`` wrote."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llmqat.data.rows import Row
from llmqat.errors import LlmqatError, error_text

ROWS_AT_ONCE = 1000
# A streamed dataset is shuffled within this many rows, always in the same order: what is held out never depends on
# the seed of a run.
SHUFFLE_BUFFER, SHUFFLE_SEED = 10_000, 0


def hub_splits(dataset: str, streaming: bool) -> dict[str, Iterable[Row]]:
    """Rows of a Hub dataset, ``name`` or ``name:config``, by split; streamed ones are read only as far as asked.

    Raises:
        LlmqatError: if it cannot be had.
    """
    import datasets

    name, _, config = dataset.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None, streaming=streaming)
    except Exception as error:  # missing, gated, offline: each library layer has exceptions of its own
        raise unreachable(dataset, error) from error
    return {split: _rows(dataset, split, rows, streaming and split == "train") for split, rows in loaded.items()}


def is_saved(path: Path) -> bool:
    """Whether a directory was written by ``save_to_disk`` of the library datasets, and not cloned from the Hub."""
    splits = [path, *path.glob("*/")] if (path / "dataset_dict.json").is_file() else [path]
    return any((split / "state.json").is_file() and any(split.glob("*.arrow")) for split in splits)


def saved_splits(path: Path) -> dict[str, Iterable[Row]]:
    """Rows of a directory written by ``save_to_disk``, by split.

    Raises:
        LlmqatError: if it cannot be read.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # OS, Arrow and JSON errors: all mean that the files are not what was saved
        raise LlmqatError(f"cannot read dataset {path}: {error_text(error)}; copy or save it again") from error
    splits = loaded if isinstance(loaded, dict) else {"all": loaded}
    return {split: _rows(str(path), split, rows, False) for split, rows in splits.items()}


def _rows(dataset: str, split: str, rows: Any, shuffled: bool) -> Iterator[Row]:
    if shuffled:
        rows = rows.shuffle(seed=SHUFFLE_SEED, buffer_size=SHUFFLE_BUFFER)
    number = 0
    try:
        for batch in rows.iter(batch_size=ROWS_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                number += 1
                yield f"{split} row {number}", dict(zip(batch, values, strict=True))
    except OSError as error:  # the network, in the middle of a stream
        raise unreachable(dataset, error) from error
    except Exception as error:  # Arrow, JSON, and the decoders of images and sounds: each has exceptions of its own
        raise LlmqatError(
            f"cannot read dataset {dataset} beyond row {number} of {split}: {error_text(error)}; mend it, or read "
            "fewer rows by --max-rows"
        ) from error


def unreachable(dataset: str, error: Exception) -> LlmqatError:
    """The error to raise where the Hub does not give a dataset."""
    return LlmqatError(
        f"cannot load dataset {dataset} from the Hub: {error_text(error)}; without a network, give a local file or "
        "stdlib"
    )
