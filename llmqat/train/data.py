"""Text in, token blocks out.

A dataset becomes three lists of documents (train, validation, test), each list one stream of ids, each stream blocks of
one length. Held-out text never meets training text: splits a dataset brings are used, others are cut off its end.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llmqat.errors import LlmqatError
from llmqat.train.stdlib_corpus import SPLITS, stdlib_texts

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
HELD_OUT = 0.05  # share of the text cut off for validation, and again for test
DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Corpus:
    """Documents by split."""

    train: list[str]
    validation: list[str]
    test: list[str]


def load_corpus(dataset: str, text_field: str = "text") -> Corpus:
    """Read a dataset: ``stdlib``, a ``.txt``/``.jsonl``/``.json``/``.parquet`` file, a directory of them, or a Hub id.

    Raises:
        LlmqatError: if it is missing, of an unknown kind, without the text column, or empty.
    """
    path = Path(dataset)
    if dataset == "stdlib":
        corpus = Corpus(*(stdlib_texts(split) for split in SPLITS))
    elif path.is_dir():
        documents = [text for file in sorted(path.rglob("*")) if file.is_file() for text in read_file(file, text_field)]
        corpus = cut(documents)
    elif path.exists():
        corpus = cut(list(read_file(path, text_field)))
    elif path.suffix in {".txt", *FORMATS} or dataset.startswith((".", "/")):
        raise LlmqatError(f"dataset {dataset} does not exist; give an existing file or directory, a Hub id, or stdlib")
    else:
        corpus = load_hub(dataset, text_field)
    if not any(text.strip() for text in corpus.train):
        raise LlmqatError(f"dataset {dataset} holds no text to train on; check the file, or --text-field")
    return corpus


def read_file(path: Path, text_field: str) -> Iterator[str]:
    """Documents of one local file: a text file is one, other formats hold one per row.

    Raises:
        LlmqatError: if the file is of an unknown kind, unreadable, or lacks the column.
    """
    if path.suffix == ".txt":
        yield path.read_text("utf-8", errors="replace")
        return
    if path.suffix not in FORMATS:
        known = ", ".join([".txt", *FORMATS])
        raise LlmqatError(f"cannot read {path}: llmqat knows {known}; convert it, or name one of those files")
    import datasets

    try:
        rows = datasets.load_dataset(FORMATS[path.suffix], data_files=str(path), split="train")
    except Exception as error:  # datasets wraps parser errors of many kinds
        raise LlmqatError(f"cannot parse {path}: {_first_line(error)}") from error
    yield from _column(rows, text_field, str(path))


def load_hub(dataset: str, text_field: str) -> Corpus:
    """A dataset of the Hub, ``name`` or ``name:config``, with its own splits where it has them.

    Raises:
        LlmqatError: if it cannot be had, or lacks the column.
    """
    import datasets

    name, _, config = dataset.partition(":")
    try:
        loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # missing, gated, offline: each library layer has exceptions of its own
        raise LlmqatError(
            f"cannot load dataset {dataset} from the Hub: {_first_line(error)}; without a network, give a local file "
            "or stdlib"
        ) from error
    columns = {split: list(_column(rows, text_field, f"{dataset}/{split}")) for split, rows in loaded.items()}
    if "train" not in columns:
        return cut([text for rows in columns.values() for text in rows])
    rest = cut(columns["train"])
    validation, test = columns.get("validation"), columns.get("test")
    if validation and test:
        return Corpus(columns["train"], validation, test)
    return Corpus(rest.train, validation or rest.validation, test or rest.test)


def _column(rows: Any, text_field: str, name: str) -> Iterable[str]:
    if text_field not in rows.column_names:
        raise LlmqatError(
            f"{name} has no column {text_field!r}; choose one of {', '.join(rows.column_names)} by --text-field"
        )
    return (text for text in rows[text_field] if isinstance(text, str))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def cut(documents: list[str]) -> Corpus:
    """Cut validation and test off the end: whole documents where there are enough, else lines of the joined text."""
    if len(documents) < 2 / HELD_OUT:
        documents = "".join(documents).splitlines(keepends=True)
        join = "".join
    else:
        join = None
    held_out = max(1, int(len(documents) * HELD_OUT)) if len(documents) > 2 else 0
    end = len(documents) - 2 * held_out
    parts = documents[:end], documents[end : end + held_out], documents[end + held_out :]
    return Corpus(*([join(part)] if join else part for part in parts))


def encode(tokenizer: Any, documents: list[str], limit: int | None = None) -> Tensor:
    """All documents as one stream of ids, each opened by whatever the tokenizer opens a text with; at most `limit`."""
    ids: list[int] = []
    remaining = iter(documents)
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        for encoded in tokenizer(batch, verbose=False)["input_ids"]:
            ids.extend(encoded)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.long)


def blocks(stream: Tensor, length: int, what: str) -> Tensor:
    """Cut a stream into ``(blocks, length)``, dropping the tail.

    Raises:
        LlmqatError: if it is shorter than one block.
    """
    count = len(stream) // length
    if count == 0:
        raise LlmqatError(
            f"the {what} text has {len(stream)} tokens, fewer than one sequence of {length}; give more text or a "
            "shorter "
            "--length or --window"
        )
    return stream[: count * length].view(count, length)


class EndlessSampler(Sampler[list[int]]):
    """Batches of block indices without end: each epoch a new order, all from the seed, from any step on."""

    def __init__(self, count: int, batch_size: int, seed: int, first_batch: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.first_batch = count, batch_size, seed, first_batch

    def indices(self, position: int) -> Iterator[int]:
        """Indices from overall `position` on."""
        while True:
            epoch, offset = divmod(position, self.count)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield from torch.randperm(self.count, generator=generator).tolist()[offset:]
            position = (epoch + 1) * self.count

    def __iter__(self) -> Iterator[list[int]]:
        indices = self.indices(self.first_batch * self.batch_size)
        while True:
            yield list(islice(indices, self.batch_size))
