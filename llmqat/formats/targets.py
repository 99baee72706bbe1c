"""The layers that a target of a config group means: one by name, all of a class, or those of a pattern.

A pattern comes with the file, and `re` can take years over one of thirty characters. Here a pattern is made of pieces
without a choice, with ``.*`` between them, and a match takes time in proportion to the length of the name.
"""

import re
from functools import lru_cache

from llmqat.errors import LlmqatError

LINEAR, CONV1D = "Linear", "Conv1D"  # classes of layers, as targets
# Letters and digits, any one character, a character after a backslash, and a number before a dot.
PIECE = re.compile(r"(?:\\d\+\\\.|\\[^\w\s]|[\w.-])*", re.ASCII)
EXPERT = re.compile(r"\\\.experts\\\.\d+\\\.")  # in an escaped name


def target_of(name: str) -> str:
    """The name of a layer; a pattern for it in every expert, if it is an expert's."""
    escaped = EXPERT.sub(r"\\.experts\\.\\d+\\.", re.escape(name))
    return name if escaped == re.escape(name) else f"re:{escaped}$"


def is_target(target: str, name: str) -> bool:
    """Whether a packed layer called `name` is one of those that `target` means.

    Raises:
        LlmqatError: if it is a pattern of a kind that llmqat does not match.
    """
    if not target.startswith("re:"):
        return target in (LINEAR, CONV1D, name)
    first, *others = _pieces(target)
    found = first.match(name)
    for piece in others:
        found = found and piece.search(name, found.end())
    return found is not None


@lru_cache(maxsize=4096)
def _pieces(target: str) -> tuple[re.Pattern[str], ...]:
    """The parts of a pattern between its ``.*``: `re` matches each of them without going back."""
    pattern = target.removeprefix("re:").removeprefix("^")
    ends = pattern.endswith("$") and not pattern.endswith("\\$")
    pieces = pattern.removesuffix("$" if ends else "").split(".*")
    if not all(PIECE.fullmatch(piece) for piece in pieces):
        raise LlmqatError(
            f"quantization_config in config.json: cannot match the target {target[:80]!r}; llmqat reads names, and "
            r"patterns of names with '.*', '\.' and '\d+\.'; name the layers instead"
        )
    return tuple(re.compile(piece) for piece in [*pieces[:-1], pieces[-1] + (r"\Z" if ends else "")])
