"""The one exception of expected failures, the warning of old spellings, and what keeps messages in one line."""

import re

RANK = re.compile(r"^\[rank\d+\]: ")  # that torch puts before the lines of a process of several
ERROR_LINE = re.compile(r"\b[A-Z]\w*(Error|Exception): ")
LONGEST = 200  # characters of another library's message that are passed on
NAMES_IN_MESSAGE = 5


class LlmqatError(ValueError):
    """Something the caller can mend: the message says what is wrong, which limit it breaks, and the remedy.

    The command line prints it as one line and exits with 1.
    """


class LlmqatDeprecationWarning(DeprecationWarning):
    """An old spelling that is accepted for one version; the message names the new one."""


def error_text(error: BaseException) -> str:
    """The message of an exception of another library as one line that is not too long; its class if it has none."""
    return shortened(" ".join(str(error).split()) or type(error).__name__)


def shortened(text: str) -> str:
    """The text as it is, or what of it is not too long."""
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def shortened_list(names: list[str]) -> str:
    """The first `NAMES_IN_MESSAGE` names, and how many more there are."""
    more = len(names) - NAMES_IN_MESSAGE
    return ", ".join(names[:NAMES_IN_MESSAGE]) + (f" and {more} more" if more > 0 else "")


def last_word(log: str, status: int) -> str:
    """The last exception that a process named, with what it said behind it; what came last, if there was none.

    Args:
        log: all that it printed.
        status: in which it ended; that of a signal is negative.
    """
    said = [RANK.sub("", line).strip() for line in log.splitlines() if line.strip()] or ["nothing was said"]
    errors = [index for index, line in enumerate(said) if ERROR_LINE.search(line)]
    word = shortened(" ".join(said[errors[-1] :] if errors else said[-1:]))
    return word if status > 0 else f"signal {-status} ended it; its last line: {word}"
