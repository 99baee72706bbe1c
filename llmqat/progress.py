"""Progress of long work: a bar on a terminal, a line of HTML in a notebook, plain lines in a log."""

import html
import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

from llmqat.processes import is_first

T = TypeVar("T")

LINE_EVERY_SECONDS = 15.0
NOTEBOOK_EVERY_SECONDS = 0.25


def log(message: str) -> None:
    """Print one plain line to standard error; of several processes, the first does."""
    if is_first():
        print(message, file=sys.stderr, flush=True)


def in_notebook() -> bool:
    """Whether a Jupyter kernel runs this process, so that output may be HTML."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and getattr(ipython.get_ipython(), "kernel", None) is not None


class ProgressView(Protocol):
    """One way of showing progress."""

    def draw(self, done: int, figures: str) -> None:
        """Show that `done` steps are done; `figures` is text beside it."""

    def close(self) -> None:
        """End the display: no step follows."""


class TerminalBar:
    """A live bar on a terminal, by rich."""

    def __init__(self, description: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.table import Column

        description_column = TextColumn("{task.description}", markup=False)
        columns = (description_column, BarColumn(bar_width=16), MofNCompleteColumn())
        # The figures take what is left of the line, and a second one on a narrow terminal.
        rest = Column(ratio=1)
        figures = TextColumn("{task.fields[figures]}", style="dim", markup=False, table_column=rest)
        self.progress = Progress(*columns, figures, console=Console(stderr=True), expand=True)
        self.task = self.progress.add_task(description, total=total, completed=done, figures="")
        self.progress.start()

    def draw(self, done: int, figures: str) -> None:
        """Move the bar to `done` steps."""
        self.progress.update(self.task, completed=done, figures=figures)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.progress.stop()


class NotebookBar:
    """A bar in the output of a notebook cell: plain HTML, which needs no widget and stays in the saved notebook."""

    def __init__(self, description: str, total: int) -> None:
        from IPython.display import HTML, display

        self.html, self.description, self.total, self.drawn = HTML, html.escape(description), total, 0.0
        self.handle: Any = display(HTML(self.text(0, "")), display_id=True)

    def text(self, done: int, figures: str) -> str:
        """The bar and its figures as HTML."""
        bar = f'<progress value="{done}" max="{self.total}" style="width:12em;vertical-align:middle"></progress>'
        return f"<div>{self.description} {bar} {done}/{self.total} <small>{html.escape(figures)}</small></div>"

    def draw(self, done: int, figures: str) -> None:
        """Redraw the bar, at most every `NOTEBOOK_EVERY_SECONDS` and at the end."""
        now = time.monotonic()
        if done == self.total or now - self.drawn >= NOTEBOOK_EVERY_SECONDS:
            self.handle.update(self.html(self.text(done, figures)))
            self.drawn = now

    def close(self) -> None:
        """Leave the bar as it is."""


class LogLines:
    """A line in the log every `LINE_EVERY_SECONDS`, and one at the end of a job that took longer than that."""

    def __init__(self, description: str, total: int) -> None:
        self.description, self.total = description, total
        self.started = self.shown = time.monotonic()

    def draw(self, done: int, figures: str) -> None:
        """Print a line if `LINE_EVERY_SECONDS` have passed."""
        now = time.monotonic()
        if now - self.shown >= LINE_EVERY_SECONDS or (done == self.total and now - self.started >= LINE_EVERY_SECONDS):
            log(f"{self.description}: {done}/{self.total}, {now - self.started:.0f} s{figures and ', '}{figures}")
            self.shown = now

    def close(self) -> None:
        """Nothing to do."""


class Meter:
    """Shows the progress of one job: steps done, figures of its own, and the time left.

    Args:
        description: what is done.
        total: steps in all.
        done: steps done before this process.
    """

    def __init__(self, description: str, total: int, done: int = 0) -> None:
        self.total, self.first, self.started = total, done, time.monotonic()
        self.view: ProgressView
        if not is_first():
            self.view = LogLines(description, total)  # whose `log` is silent
        elif in_notebook():
            self.view = NotebookBar(description, total)
        elif sys.stderr.isatty():
            self.view = TerminalBar(description, total, done)
        else:
            self.view = LogLines(description, total)

    def update(self, done: int, figures: str = "") -> None:
        """Show `done` steps, with `figures` beside them."""
        per_step = (time.monotonic() - self.started) / max(1, done - self.first)
        left = f"{duration(per_step * (self.total - done))} left" if done < self.total else ""
        self.view.draw(done, ", ".join(part for part in (left, figures) if part))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.view.close()


def duration(seconds: float) -> str:
    """Seconds in words: ``7 s``, ``3 min 20 s``, ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, showing how many of `total` are done."""
    with Meter(description, total) as meter:
        for done, item in enumerate(items, start=1):
            yield item
            meter.update(done)
