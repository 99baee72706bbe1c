"""Rows of local files: JSON, tables, Parquet. A row that cannot be read is counted, not fatal."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from llmqat.data.rows import Row, Unreadable
from llmqat.data.text_files import NUL_REMEDY, decoding_error, open_regular, read_text, text_lines
from llmqat.errors import LlmqatError, error_text

ROWS_AT_ONCE = 1000
NO_OBJECT = "not an object"
CSV_CELL_LIMIT = 2**31 - 1
MOST_DIGITS = 4300  # of an integer that Python reads; more become a float
# Columns whose list of objects is one conversation; every other single list in a JSON object holds the rows.
CHAT_COLUMNS = ("messages", "conversations", "conversation")


def _integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def parse_json(text: str) -> Any:
    """A value from its JSON text.

    Raises:
        ValueError: if it is not JSON, or nested too deeply; the message is one line.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise ValueError(f"not JSON ({error.msg} at {place})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error


def json_lines(path: Path) -> Iterator[Row]:
    """Rows of a file that holds an object per line."""
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            yield f"{path.name} line {number}", _parsed(line)


def json_rows(path: Path) -> Iterator[Row]:
    """Rows of a list of objects, or of an object that holds one such list; else of an object per line.

    Raises:
        LlmqatError: if a list is not JSON.
    """
    text = read_text(path)
    try:
        parsed = parse_json(text)
    except ValueError as error:
        if text.lstrip()[:1] == "[":
            raise LlmqatError(f"cannot parse {path}: {error}; mend it, or write one object per line") from error
        yield from json_lines(path)
        return
    yield from _objects(parsed, path.name)


def _objects(parsed: Any, name: str) -> Iterator[Row]:
    if isinstance(parsed, dict):
        lists = [column for column, value in parsed.items() if isinstance(value, list)]
        holds_rows = len(lists) == 1 and lists[0] not in CHAT_COLUMNS
        holds_rows = holds_rows and all(isinstance(item, dict) for item in parsed[lists[0]])
        parsed = parsed[lists[0]] if holds_rows else [parsed]
    for number, row in enumerate(parsed if isinstance(parsed, list) else [parsed], start=1):
        yield f"{name} row {number}", row if isinstance(row, dict) else NO_OBJECT


def _parsed(line: str) -> dict[str, Any] | str:
    broken = decoding_error(line) or ("a NUL: " + NUL_REMEDY if "\0" in line else None)
    if broken is not None:
        return broken
    try:
        row = parse_json(line.strip())
    except ValueError as error:
        return str(error)
    return row if isinstance(row, dict) else NO_OBJECT


def csv_rows(path: Path) -> Iterator[Row]:
    """Rows of a table whose first line names the columns; every value is text.

    Raises:
        LlmqatError: if two columns have one name.
    """
    csv.field_size_limit(CSV_CELL_LIMIT)
    table = csv.reader(text_lines(path), strict=True)
    columns: list[str] | None = None
    end = 0
    while True:
        start, broken, cells = end + 1, None, list[str]()
        try:
            cells = next(table)
        except StopIteration:
            return
        except csv.Error as error:  # a quote that nothing closes takes all lines to the end
            broken = f"not a row of a table ({error})"
        end = table.line_num
        if broken is None and columns is None and cells:
            columns = _distinct(cells, path)
        elif broken is not None:
            yield from ((f"{path.name} line {number}", broken) for number in range(start, end + 1))
        elif cells and columns is not None:
            yield f"{path.name} line {end}", _cells(columns, cells)


def _cells(columns: list[str], cells: list[str]) -> dict[str, Any] | str:
    if len(cells) != len(columns):
        return f"{len(cells)} cells under {len(columns)} columns"
    broken = next(filter(None, map(decoding_error, cells)), None)
    return broken or dict(zip(columns, cells, strict=True))


def _distinct(columns: Sequence[str], path: Path) -> list[str]:
    """Names of columns.

    Raises:
        LlmqatError: if one names two columns, of which only the last would be read.
    """
    twice = next((name for index, name in enumerate(columns) if name in columns[:index]), None)
    if twice is not None:
        raise LlmqatError(f"{path} has two columns named {twice!r}; rename one of them")
    return list(columns)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Rows of a Parquet file.

    Raises:
        LlmqatError: if it is none.
    """
    import pyarrow
    import pyarrow.parquet

    open_regular(path).close()
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _distinct(file.schema_arrow.names, path)
            for batch in file.iter_batches(ROWS_AT_ONCE):
                for values in zip(*(_values(column) for column in batch.columns), strict=True):
                    number += 1
                    yield f"{path.name} row {number}", dict(zip(columns, values, strict=True))
    except LlmqatError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise LlmqatError(f"cannot parse {path}: {error_text(error)}; copy or download it again") from error


def _values(column: Any) -> list[Any]:
    """Python values of an Arrow column; `Unreadable` for text that is not UTF-8, dates out of range, ..."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        values = [_value(scalar) for scalar in column]
    return values


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        return Unreadable(error_text(error))


# Suffix of a file -> how its rows are read. A text file has no rows: the file is one document.
READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": json_lines,
    ".json": json_rows,
    ".parquet": parquet_rows,
    ".csv": csv_rows,
}
SUFFIXES = (".txt", *READERS)
