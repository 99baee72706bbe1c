"""Datasets known by one word: where they lie on the Hub, and how papers cut the text they report perplexity on.

The cuts are those of IST-DASLab/gptq, ``datautils.py`` (`get_wikitext2`, `get_ptb`, `get_ptb_new`, `get_c4`,
`get_c4_new`), under its names. Only there do "C4" and "PTB" of two papers mean the same number.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from llmqat.data.hub import unreachable
from llmqat.errors import LlmqatError

PUBLISHED_WINDOW = 2048  # tokens; the window is a part of the metric
PUBLISHED_WINDOWS = 256  # of C4


@dataclass(frozen=True)
class NamedSet:
    """A dataset of the Hub and a published protocol.

    Attributes:
        hub: repository.
        scored: split whose text is scored.
        train: split to train on.
        validation: split that chooses the best state; None: the end of the training split.
        config: configuration of the repository.
        files: split -> data file in the repository, where it has no configuration to load.
        revision: of the repository.
        column: of the text.
        joiner: stands between documents; None: each window is cut out of a document of its own, at random.
        documents: only so many are joined.
        windows: only so many are scored.
        train_rows: only so many are read to train on, as a stream.
    """

    hub: str
    scored: str
    train: str = "train"
    validation: str | None = None
    config: str | None = None
    files: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    column: str = "text"
    joiner: str | None = "\n\n"
    documents: int | None = None
    windows: int | None = None
    train_rows: int | None = None

    def texts(self, split: str, rows: int | None = None) -> list[str]:
        """The texts of a split, empty ones included: they are a part of what papers join.

        Args:
            split: of the repository.
            rows: read only the first ones, as a stream.

        Raises:
            LlmqatError: if it cannot be had.
        """
        import datasets

        files = {split: self.files[split]} if self.files else None
        try:
            loaded = datasets.load_dataset(
                self.hub,
                self.config,
                data_files=files,
                revision=self.revision,
                split=split,
                streaming=rows is not None,
            )
            if rows is not None:
                return [row[self.column] for row in islice(loaded, rows)]
            return list(loaded[self.column])
        except Exception as error:  # missing, gated, offline: each library layer has exceptions of its own
            raise unreachable(self.hub, error) from error


# The Hub no longer runs the script that ptb_text_only is; its files were converted.
PTB: dict[str, Any] = {
    "hub": "ptb-text-only/ptb_text_only",
    "files": {split: f"penn_treebank/{split}/*.parquet" for split in ("train", "validation", "test")},
    "revision": "refs/convert/parquet",
    "column": "sentence",
}
C4: dict[str, Any] = {
    "hub": "allenai/c4",
    "scored": "validation",
    "files": {
        "train": "en/c4-train.00000-of-01024.json.gz",
        "validation": "en/c4-validation.00000-of-00008.json.gz",
    },
    "windows": PUBLISHED_WINDOWS,
    "train_rows": 20_000,
}
NAMED_SETS = {
    "wikitext2": NamedSet("Salesforce/wikitext", "test", validation="validation", config="wikitext-2-raw-v1"),
    "ptb": NamedSet(scored="validation", **PTB),
    "ptb-new": NamedSet(scored="test", validation="validation", joiner=" ", **PTB),
    "c4": NamedSet(joiner=None, **C4),
    "c4-new": NamedSet(joiner=" ", documents=1100, **C4),
}


def named_set(dataset: str) -> NamedSet | None:
    """The set of that name; None if it is no name of the table, or a local file or directory has it."""
    return None if Path(dataset).exists() else NAMED_SETS.get(dataset)


def check_options(dataset: str, streaming: bool, rows: str) -> None:
    """Refuse what does not apply to a named set.

    Raises:
        LlmqatError: for ``--streaming`` and ``--rows chat``.
    """
    if streaming or rows == "chat":
        option = "--streaming" if streaming else "--rows chat"
        raise LlmqatError(
            f"{dataset} is read as papers read it, without {option}; leave that out, or name the Hub id "
            f"({NAMED_SETS[dataset].hub})"
        )
