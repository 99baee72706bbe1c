"""Rows of a dataset: local files, and the Hub. A row that cannot be read is counted, not fatal."""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from llmqat.errors import LlmqatError
from llmqat.progress import say

# Where a row stands ("my.jsonl line 7"), and its columns; or why it has none.
Row = tuple[str, dict[str, Any] | str]
ROWS_AT_ONCE = 1000
# A streamed dataset is shuffled within this many rows, always in the same order: what is held out never depends on
# the seed of a run.
SHUFFLE_BUFFER, SHUFFLE_SEED = 10_000, 0
NO_OBJECT = "not an object"
CSV_CELL_LIMIT = 2**31 - 1


class BadRows:
    """Rows that were left out: how many, and why the first one was."""

    def __init__(self) -> None:
        self.count, self.first = 0, ""

    def add(self, place: str, reason: object) -> None:
        """Count a row, and remember the first."""
        self.count += 1
        self.first = self.first or f"{place}: {reason}"

    def report(self, name: str, good: int) -> None:
        """One line about dataset `name`, of which `good` rows could be used; none if there is nothing to tell."""
        if self.count:
            say(f"{name}: {self.count} of {self.count + good} rows left out; the first one, {self.first}")


def json_rows(path: Path) -> Iterator[Row]:
    """An object per line; or, in a ``.json`` file, a list of objects, or an object that holds one such list.

    Raises:
        LlmqatError: if a list is not JSON.
    """
    if path.suffix == ".json":
        text = path.read_text("utf-8-sig", errors="replace")
        try:
            parsed = json.loads(text)
        except json.JSONDecodeError as error:
            if text.lstrip()[:1] == "[":
                raise LlmqatError(f"cannot parse {path}: {error}; mend it, or write one object per line") from error
        else:
            yield from _objects(parsed, path.name)
            return
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"{path.name} line {number}", _parsed(line)


def _objects(parsed: Any, name: str) -> Iterator[Row]:
    if isinstance(parsed, dict):
        lists = [value for value in parsed.values() if isinstance(value, list)]
        parsed = lists[0] if len(lists) == 1 and all(isinstance(item, dict) for item in lists[0]) else [parsed]
    for number, row in enumerate(parsed if isinstance(parsed, list) else [parsed], start=1):
        yield f"{name} row {number}", row if isinstance(row, dict) else NO_OBJECT


def _parsed(line: str) -> dict[str, Any] | str:
    try:
        row = json.loads(line.strip())
    except json.JSONDecodeError as error:
        return f"not JSON ({error.msg} at column {error.colno})"
    return row if isinstance(row, dict) else NO_OBJECT


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; every value is text."""
    csv.field_size_limit(CSV_CELL_LIMIT)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        table = csv.DictReader(line.replace("\0", "") for line in file)
        columns = table.fieldnames or []
        for row in table:
            place = f"{path.name} line {table.line_num}"
            if None in row or None in row.values():
                cells = sum(value is not None for value in row.values()) - (None in row)
                cells += len(row.get(None) or [])  # type: ignore[call-overload]
                yield place, f"{cells} cells under {len(columns)} columns"
            else:
                yield place, row


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file.

    Raises:
        LlmqatError: if it is none.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches(ROWS_AT_ONCE) for row in batch.to_pylist())
            yield from ((f"{path.name} row {number}", row) for number, row in enumerate(rows, start=1))
    except (pyarrow.ArrowException, OSError) as error:
        raise LlmqatError(f"cannot parse {path}: {first_line(error)}; copy or download it again") from error


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_rows,
    ".json": json_rows,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
}
SUFFIXES = (".txt", *READERS)


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
    return {split: _hub_rows(dataset, split, rows, streaming and split == "train") for split, rows in loaded.items()}


def is_saved(path: Path) -> bool:
    """Whether a directory was written by ``save_to_disk`` of the library datasets."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def saved_splits(path: Path) -> dict[str, Iterable[Row]]:
    """Rows of a directory written by ``save_to_disk``, by split.

    Raises:
        LlmqatError: if it cannot be read.
    """
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # OS, Arrow and JSON errors: all mean that the files are not what was saved
        raise LlmqatError(f"cannot read dataset {path}: {first_line(error)}; copy or save it again") from error
    splits = loaded if isinstance(loaded, dict) else {"all": loaded}
    return {split: _hub_rows(str(path), split, rows, False) for split, rows in splits.items()}


def _hub_rows(dataset: str, split: str, rows: Any, shuffled: bool) -> Iterator[Row]:
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


def unreachable(dataset: str, error: Exception) -> LlmqatError:
    """What to raise where the Hub does not give a dataset."""
    return LlmqatError(
        f"cannot load dataset {dataset} from the Hub: {first_line(error)}; without a network, give a local file or "
        "stdlib"
    )


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
