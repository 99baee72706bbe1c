"""A dataset as three lists of documents: train, validation and test."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

from llmqat.config import ROWS
from llmqat.data.folders import data_files, suffix_of
from llmqat.data.hub import hub_splits, is_saved, saved_splits
from llmqat.data.layouts import Layout, documents_of
from llmqat.data.messages import Document
from llmqat.data.named_sets import NamedSet, check_options, named_set
from llmqat.data.rows import BadRows, Row
from llmqat.data.sources import READERS, SUFFIXES
from llmqat.data.splits import Corpus, assembled, hold_out
from llmqat.data.stdlib import SPLITS, stdlib_texts
from llmqat.data.text_files import check_regular, read_text
from llmqat.errors import LlmqatError
from llmqat.progress import log

STREAMED_ROWS = 20_000


def load_corpus(
    dataset: str, text_field: str = "text", rows: str = "auto", streaming: bool = False, max_rows: int | None = None
) -> Corpus:
    """Read a dataset: ``stdlib``, a local file (`SUFFIXES`), a directory of them, a name of `NAMED_SETS`, or a Hub id.

    Rows that cannot be used are left out; how many, and why the first one was, is printed.

    Args:
        dataset: what to read; ``name:config`` on the Hub.
        text_field: column of texts.
        rows: "chat" reads conversations (messages, prompt and completion, instruction and output), "text" the column
            `text_field`; "auto" reads conversations where the columns look like them.
        streaming: read a Hub dataset without downloading all of it, `STREAMED_ROWS` rows by default.
        max_rows: read at most so many rows of each file or split.

    Returns:
        training, validation and test documents: texts, or conversations.

    Raises:
        LlmqatError: if it is missing, of an unknown kind, without the columns it needs, or empty.
    """
    if rows not in ROWS:
        raise LlmqatError(f"rows must be one of {', '.join(ROWS)}; got {rows!r}")
    reader = _Reader(dataset, text_field, rows, max_rows)
    path = local_path(dataset)
    if streaming and (dataset == "stdlib" or path is not None):
        raise LlmqatError(f"--streaming is for datasets of the Hub; {dataset} is local: use --max-rows to read less")
    known = named_set(dataset)
    if known is not None:
        check_options(dataset, streaming, rows)
        corpus = _named(known, max_rows)
    elif dataset == "stdlib":
        corpus = Corpus(*(list[Document](stdlib_texts(split)) for split in SPLITS))
    elif path is not None:
        corpus = _local(path, reader)
    else:
        if streaming:
            reader.max_rows = max_rows or STREAMED_ROWS
        parts = {split: reader.rows(rows, split) for split, rows in hub_splits(dataset, streaming).items()}
        corpus = assembled(parts, dataset)
    reader.report(corpus)
    return corpus


def local_path(dataset: str) -> Path | None:
    """The file or directory that a dataset names; None if it is a name of the Hub.

    Raises:
        LlmqatError: if it cannot be read, or looks like a path and there is none.
    """
    path = Path(dataset)
    try:
        path.stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:  # a link to itself, no permission, a name too long or with a NUL
        reason = getattr(error, "strerror", None) or error
        raise LlmqatError(f"cannot read dataset {dataset[:200]!r}: {reason}; check its name") from error
    else:
        return path
    if suffix_of(path) in SUFFIXES or dataset.startswith((".", "/")):
        raise LlmqatError(f"dataset {dataset} does not exist; give an existing file or directory, a Hub id, or stdlib")
    return None


def _local(path: Path, reader: "_Reader") -> Corpus:
    """A file, a directory of files, or a directory that ``save_to_disk`` wrote."""
    if not path.is_dir():
        return hold_out(reader.file(path))
    if is_saved(path):
        parts = {split: reader.rows(rows, split) for split, rows in saved_splits(path).items()}
    else:
        parts = {str(file.relative_to(path)): reader.file(file) for file in data_files(path)}
    return assembled(parts, str(path))


def _named(known: NamedSet, max_rows: int | None) -> Corpus:
    """Training text of a named set, and as its test split the one that papers score, whole."""
    limits = [rows for rows in (max_rows, known.train_rows) if rows is not None]
    parts = {known.train: list[Document](known.texts(known.train, min(limits, default=None)))}
    if known.validation is not None:
        parts["validation"] = list[Document](known.texts(known.validation))
    return assembled({**parts, "test": list[Document](known.texts(known.scored))}, known.hub)


class _Reader:
    """Reads documents of one dataset, and counts them and what it left out."""

    def __init__(self, name: str, text_field: str, kind: str, max_rows: int | None) -> None:
        self.name, self.text_field, self.kind, self.max_rows = name, text_field, kind, max_rows
        self.bad, self.layouts, self.count = BadRows(), list[Layout](), 0

    def file(self, path: Path) -> list[Document]:
        """Documents of one local file: a text file is one, other formats hold one per row.

        Raises:
            LlmqatError: if the file is of an unknown kind, unreadable, or lacks the columns.
        """
        suffix = suffix_of(path)
        if suffix == ".txt":
            self._same_layout(Layout(("text",), str, False), str(path))
            self.count += 1
            return [read_text(path)]
        if suffix not in READERS:
            check_regular(path, path.stat().st_mode)
            raise LlmqatError(
                f"cannot read {path}: llmqat knows {', '.join(SUFFIXES)}; convert it, or name one of those files"
            )
        return self.rows(READERS[suffix](path), path.name)

    def rows(self, rows: Iterable[Row], part: str) -> list[Document]:
        """Documents of the rows of a file or split."""
        name = self.name if part in self.name else f"{self.name}/{part}"
        layout, documents = documents_of(islice(rows, self.max_rows), self.bad, self.text_field, self.kind, name)
        if layout is not None:
            self._same_layout(layout, name)
        self.count += len(documents)
        return documents

    def _same_layout(self, layout: Layout, name: str) -> None:
        if self.layouts and self.layouts[0].chat != layout.chat:
            raise LlmqatError(
                f"{self.name} mixes texts and conversations ({name} differs from what came before); keep them apart, "
                "or read every row as text with --rows text"
            )
        self.layouts.append(layout)

    def report(self, corpus: Corpus) -> None:
        """Log what was read, and what was left out.

        Raises:
            LlmqatError: if there is nothing to train on.
        """
        if not any(not isinstance(document, str) or document.strip() for document in corpus.train):
            reason = f" ({self.bad.count} rows left out; the first one, {self.bad.first})" if self.bad.count else ""
            raise LlmqatError(f"dataset {self.name} holds no text to train on{reason}; check the file, or --text-field")
        self.bad.check(self.name, self.count)
        self.bad.report(self.name, self.count)
        if corpus.is_chat:
            columns = ", ".join(self.layouts[0].columns)
            unused = ", ".join(f"{column} ({count})" for column, count in self.bad.unused.items())
            log(
                f"{self.name}: {self.count} conversations ({columns}{unused and '; not used: '}{unused}); only "
                "answers count in losses and perplexity (--rows text reads texts)"
            )
