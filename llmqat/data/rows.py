"""Rows of a dataset before anything is known of their columns, and the count of those that cannot be used."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from llmqat.errors import LlmqatError
from llmqat.progress import log

# Where a row stands ("my.jsonl line 7"), and its columns; or why it has none.
Row = tuple[str, dict[str, Any] | str]
MOST_BAD_ROWS = 0.5  # share of the rows beyond which a dataset is refused: it is not what it was taken for


class BadRow(ValueError):
    """A row that does not hold what its columns promise; its text is the reason."""


@dataclass(frozen=True)
class Unreadable:
    """Stands for a value of a row that its file format cannot give back as a Python value."""

    reason: str


class BadRows:
    """Rows that were left out: how many, and why the first one was; and `unused`, in how many of the others a column
    that nothing is read from holds something.
    """

    def __init__(self) -> None:
        self.count, self.first = 0, ""
        self.unused = Counter[str]()

    def add(self, place: str, reason: object) -> None:
        """Count a row, and remember the first."""
        self.count += 1
        self.first = self.first or f"{place}: {reason}"

    def report(self, name: str, good: int) -> None:
        """Log one line about dataset `name`, of which `good` rows could be used; none if there is nothing to tell."""
        if self.count:
            log(f"{name}: {self.count} of {self.count + good} rows left out; the first one, {self.first}")

    def check(self, name: str, good: int) -> None:
        """Refuse a dataset of which most rows cannot be used.

        Raises:
            LlmqatError: beyond `MOST_BAD_ROWS`.
        """
        total = self.count + good
        if self.count > MOST_BAD_ROWS * total:
            raise LlmqatError(
                f"{name}: {self.count} of {total} rows cannot be used, more than {MOST_BAD_ROWS:.0%}; the first one, "
                f"{self.first}; mend these rows, or remove them from the dataset"
            )
