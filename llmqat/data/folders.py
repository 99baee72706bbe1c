"""Directories of data: which files in one are data, and what their names tell."""

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from llmqat.data.sources import SUFFIXES
from llmqat.data.text_files import check_regular
from llmqat.errors import LlmqatError
from llmqat.progress import log

# Files that tell of a dataset, a repository or a model: never data, whatever their suffixes. In lower case.
METADATA = (
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),  # of the library datasets
    *("croissant*.json", "metadata.json", "dataset-metadata.json", "dataset_description.json", "datapackage.json"),
    *("readme*", "license*", "licence*", "copying*", "notice*", "citation*", "changelog*", "contributing*", "authors*"),
    *("requirements*.txt", "cmakelists.txt", "package.json", "package-lock.json", "manifest.json"),
    *(
        "config.json",
        "*_config.json",
        "tokenizer.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "special_tokens_map.json",
    ),
    *("added_tokens.json", "*.index.json"),  # of a model
)
# Words in the name of a file or folder that say which split it is.
SPLIT_WORDS = {
    "train": "train",
    **{word: "validation" for word in ("validation", "valid", "val", "dev")},
    "test": "test",
}


def data_files(folder: Path) -> list[Path]:
    """Files below a folder that hold data, in the order of their names; what is left out is counted and named.

    Raises:
        LlmqatError: if there is none, one is no regular file, or the folder cannot be read.
    """
    files = [file for file in sorted(_files_below(folder)) if not _hidden(file.relative_to(folder))]
    known = [file for file in files if suffix_of(file) in SUFFIXES and not is_metadata(file) and not _empty(file)]
    if not known:
        raise LlmqatError(
            f"directory {folder} holds no file that llmqat can read; it knows {', '.join(SUFFIXES)}, and leaves out "
            "empty files and those about a dataset or a model"
        )
    if len(known) < len(files):
        other = next(file for file in files if file not in known)
        log(f"{folder}: {len(files) - len(known)} other files left out, such as {other.relative_to(folder)}")
    return known


def _empty(file: Path) -> bool:
    """Whether a file holds nothing.

    Raises:
        LlmqatError: if it is no regular file.
    """
    try:
        status = file.stat()
    except OSError as error:  # a link to nothing, or to itself
        raise LlmqatError(f"cannot read {file}: {error.strerror}; restore or remove it") from error
    check_regular(file, status.st_mode)
    return status.st_size == 0


def suffix_of(path: Path) -> str:
    """Suffix of a file in lower case, as `SUFFIXES` has them."""
    return path.suffix.lower()


def is_metadata(path: Path) -> bool:
    """Whether a file tells of a dataset or a model, rather than being one."""
    return any(fnmatch(path.name.lower(), pattern) for pattern in METADATA)


def _files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder; linked folders are followed, each only once."""

    def refuse(error: OSError) -> None:
        raise LlmqatError(f"cannot read directory {error.filename}: {error.strerror}; check its permissions") from error

    seen = set[tuple[int, int]]()
    for directory, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = os.stat(directory)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(directory, name) for name in files)


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "__MACOSX")) for part in path.parts)


def split_named(name: str) -> str | None:
    """The split that the name of a file, or else of a folder above it, tells: ``wiki.valid.txt``, ``test/1.jsonl``."""
    for part in reversed(Path(name).parts):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None
