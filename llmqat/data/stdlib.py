"""The standard library of the running Python, read as a text corpus.

Every machine that can run llmqat has it, so ``--dataset stdlib`` needs no network. Files are taken in a fixed order and
split *by file*: a file's split depends on its relative path alone, so a held-out file is held out under every Python
version, and the bundled Llama has never seen it.
"""

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SPLITS = ("train", "validation", "test")

# Third-party code, test suites, and tables written by a program rather than a person (character maps, the text of the
# language reference as one dict, build settings of this machine).
EXCLUDED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "__pycache__"}
)
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")


def _is_excluded(relative: Path) -> bool:
    return any(part in EXCLUDED_FOLDERS or part.startswith(EXCLUDED_PREFIXES) for part in relative.parts)


def split_of(relative: str) -> str:
    """Split of the file at `relative` (POSIX path below the library folder): 1 file in 20 each for test, validation."""
    bucket = int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "big") % 20
    return {0: "test", 1: "validation"}.get(bucket, "train")


def stdlib_files(split: str) -> Iterator[Path]:
    """Paths of one split, sorted by relative path.

    Raises:
        ValueError: if `split` is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of the stdlib corpus; choose one of {', '.join(SPLITS)}")
    root = Path(sysconfig.get_path("stdlib"))
    relatives = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    for relative in relatives:
        if not _is_excluded(Path(relative)) and split_of(relative) == split:
            yield root / relative


def stdlib_texts(split: str) -> list[str]:
    """Source texts of one split, a string per file (see `stdlib_files`); undecodable bytes are replaced."""
    return [text for path in stdlib_files(split) if (text := path.read_text("utf-8", errors="replace")).strip()]
