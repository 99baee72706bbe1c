"""A dataset as three lists of documents: train, validation and test.

Documents are texts or conversations. Held-out ones never meet training ones: splits a dataset brings are used, others
are cut off its end, conversations in the order of their hashes. No seed changes what is held out.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

from llmqat.config import ROWS
from llmqat.data.chat import is_chat
from llmqat.data.layouts import Document, Layout, documents_of
from llmqat.data.named_sets import NamedSet, check_options, named_set
from llmqat.data.sources import READERS, SUFFIXES, BadRows, Row, hub_splits, is_saved, saved_splits
from llmqat.data.stdlib import SPLITS, stdlib_texts
from llmqat.errors import LlmqatError
from llmqat.progress import say

HELD_OUT = 0.05  # share of the documents cut off for validation, and again for test
STREAMED_ROWS = 20_000
# Words in the name of a file or folder that say which split it is.
SPLIT_WORDS = {
    "train": "train",
    **{word: "validation" for word in ("validation", "valid", "val", "dev")},
    "test": "test",
}


@dataclass(frozen=True)
class Corpus:
    """Documents by split: texts, or conversations (lists of messages)."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return is_chat(self.train)


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
    path = Path(dataset)
    if streaming and (dataset == "stdlib" or path.exists()):
        raise LlmqatError(f"--streaming is for datasets of the Hub; {dataset} is local: use --max-rows to read less")
    known = named_set(dataset)
    if known is not None:
        check_options(dataset, streaming, rows)
        corpus = _named(known, max_rows)
    elif dataset == "stdlib":
        corpus = Corpus(*(list[Document](stdlib_texts(split)) for split in SPLITS))
    elif is_saved(path):
        corpus = _assembled({split: reader.rows(of, split) for split, of in saved_splits(path).items()})
    elif path.is_dir():
        corpus = _directory(path, reader)
    elif path.exists():
        corpus = cut(reader.file(path))
    elif path.suffix in SUFFIXES or dataset.startswith((".", "/")):
        raise LlmqatError(f"dataset {dataset} does not exist; give an existing file or directory, a Hub id, or stdlib")
    else:
        if streaming:
            reader.max_rows = max_rows or STREAMED_ROWS
        corpus = _assembled({split: reader.rows(of, split) for split, of in hub_splits(dataset, streaming).items()})
    reader.report(corpus)
    return corpus


def _named(known: NamedSet, max_rows: int | None) -> Corpus:
    """Training text of a named set, and as its test split the one that papers score, whole."""
    limits = [rows for rows in (max_rows, known.train_rows) if rows is not None]
    parts = {known.train: list[Document](known.texts(known.train, min(limits, default=None)))}
    if known.validation is not None:
        parts["validation"] = list[Document](known.texts(known.validation))
    return _assembled({**parts, "test": list[Document](known.texts(known.scored))})


class _Reader:
    """Reads documents of one dataset, and keeps the count of what it left out."""

    def __init__(self, name: str, text_field: str, kind: str, max_rows: int | None) -> None:
        self.name, self.text_field, self.kind, self.max_rows = name, text_field, kind, max_rows
        self.bad, self.layouts = BadRows(), list[Layout]()

    def file(self, path: Path) -> list[Document]:
        """Documents of one local file: a text file is one, other formats hold one per row.

        Raises:
            LlmqatError: if the file is of an unknown kind, unreadable, or lacks the columns.
        """
        if path.suffix == ".txt":
            self._same_layout(Layout(("text",), str, False), str(path))
            return [path.read_text("utf-8", errors="replace")]
        if path.suffix not in READERS:
            raise LlmqatError(
                f"cannot read {path}: llmqat knows {', '.join(SUFFIXES)}; convert it, or name one of those files"
            )
        return self.rows(READERS[path.suffix](path), path.name)

    def rows(self, rows: Iterable[Row], part: str) -> list[Document]:
        """Documents of the rows of a file or split."""
        name = self.name if part in self.name else f"{self.name}/{part}"
        layout, documents = documents_of(islice(rows, self.max_rows), self.bad, self.text_field, self.kind, name)
        if layout is not None:
            self._same_layout(layout, name)
        return documents

    def _same_layout(self, layout: Layout, name: str) -> None:
        if self.layouts and self.layouts[0].chat != layout.chat:
            raise LlmqatError(
                f"{self.name} mixes texts and conversations ({name} differs from what came before); keep them apart, "
                "or read every row as text with --rows text"
            )
        self.layouts.append(layout)

    def report(self, corpus: Corpus) -> None:
        """Say what was read, and what was left out.

        Raises:
            LlmqatError: if there is nothing to train on.
        """
        documents = [*corpus.train, *corpus.validation, *corpus.test]
        if not any(not isinstance(document, str) or document.strip() for document in corpus.train):
            reason = f" ({self.bad.count} rows left out; the first one, {self.bad.first})" if self.bad.count else ""
            raise LlmqatError(f"dataset {self.name} holds no text to train on{reason}; check the file, or --text-field")
        self.bad.report(self.name, len(documents))
        if corpus.is_chat:
            say(
                f"{self.name}: {len(documents)} conversations ({', '.join(self.layouts[0].columns)}); only answers "
                "count in losses and perplexity (--rows text reads texts)"
            )


def _directory(folder: Path, reader: _Reader) -> Corpus:
    """All files below a folder that can be read, in the order of their names; by split where the names tell.

    Raises:
        LlmqatError: if there is none.
    """
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and not _hidden(file.relative_to(folder))]
    known = [file for file in files if file.suffix in SUFFIXES]
    if not known:
        raise LlmqatError(f"directory {folder} holds no file that llmqat can read; it knows {', '.join(SUFFIXES)}")
    if len(known) < len(files):
        other = next(file for file in files if file not in known)
        say(f"{folder}: {len(files) - len(known)} other files left out, such as {other.relative_to(folder)}")
    return _assembled({str(file.relative_to(folder)): reader.file(file) for file in known})


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def split_named(name: str) -> str | None:
    """The split that the name of a file, or else of a folder above it, tells: ``wiki.valid.txt``, ``test/1.jsonl``."""
    for part in reversed(Path(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


def _assembled(parts: Mapping[str, list[Document]]) -> Corpus:
    """Train, validation and test as they came; what is missing is cut off the end of the training split.

    If no part is called train, their names tell (``train_sft``, ``test/1.jsonl``; one that tells nothing is for
    training); if none tells, all parts are cut.
    """
    splits = dict(parts)
    if "train" not in splits:
        named = {name: split_named(name) for name in parts}
        if "train" not in named.values():
            return cut(list(chain.from_iterable(parts.values())))
        splits = {"train": [], "validation": [], "test": []}
        for name, documents in parts.items():
            splits[named[name] or "train"].extend(documents)
    validation, test = splits.get("validation"), splits.get("test")
    if validation and test:
        return Corpus(splits["train"], validation, test)
    rest = cut(splits["train"])
    return replace(rest, validation=validation or rest.validation, test=test or rest.test)


def cut(documents: list[Document]) -> Corpus:
    """Cut validation and test off the end.

    Conversations are put into the order of their hashes before: it depends on nothing but themselves. Of texts, whole
    documents are cut off where there are enough, else lines of the joined text.
    """
    joined = not is_chat(documents) and len(documents) < 2 / HELD_OUT
    if is_chat(documents):
        documents = sorted(documents, key=_hash)
    elif joined:
        documents = list("".join(map(str, documents)).splitlines(keepends=True))
    held_out = max(1, int(len(documents) * HELD_OUT)) if len(documents) > 2 else 0
    end = len(documents) - 2 * held_out
    parts = documents[:end], documents[end : end + held_out], documents[end + held_out :]
    if joined:
        return Corpus(*(list[Document](["".join(map(str, part))]) for part in parts))
    return Corpus(*parts)


def _hash(document: Document) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, default=str).encode()).hexdigest()
