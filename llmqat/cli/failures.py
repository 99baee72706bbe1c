"""One line for each failure of a command: what is wrong, with a remedy wherever the kind of failure is known."""

import errno
import json
import re

from llmqat.errors import LlmqatError
from llmqat.files import storage_problem

MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate|not enough memory|bad_alloc", re.IGNORECASE)
NETWORK = (
    "ConnectionError",
    "ConnectTimeout",
    "ReadTimeout",
    "HfHubHTTPError",
    "LocalEntryNotFoundError",
    "ConnectError",
)
LESS_MEMORY = "lower --batch-size or --length, add --gradient-checkpointing, use --train lora, or add --low-memory"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def line_of(error: BaseException) -> str:
    """One line about `error`: what is wrong, and what to do."""
    text = " ".join(str(error).split())
    if isinstance(error, LlmqatError):
        return text
    known = _memory(error, text) or _storage(error) or _network(error, text) or _content(error, text)
    return known or f"unexpected {type(error).__name__}: {text[:500]}; --debug shows where"


def _memory(error: BaseException, text: str) -> str | None:
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and MEMORY.search(text)):
        return f"out of memory ({text[:120] or 'the system has no more'}); {LESS_MEMORY}"
    return None


def _storage(error: BaseException) -> str | None:
    problem = storage_problem(error)
    if problem is None or type(error).__name__ in NETWORK:
        return None
    name = getattr(error, "filename", None)
    where = f" {name}" if name else ""
    if getattr(error, "errno", None) in FULL:
        return f"cannot write{where}: {problem}; free some space, or choose another place"
    return f"cannot use{where or ' a file'}: {problem}; check its name and its permissions"


def _network(error: BaseException, text: str) -> str | None:
    if type(error).__name__ in NETWORK or isinstance(error, ConnectionError | TimeoutError):
        return f"the network failed ({text[:200]}); try again, or give local directories and files"
    return None


def _content(error: BaseException, text: str) -> str | None:
    if isinstance(error, json.JSONDecodeError):
        return f"a file holds damaged JSON ({text[:120]}); copy or write the directory again"
    if isinstance(error, UnicodeError):
        return f"a text is not UTF-8 ({text[:120]}); convert it to UTF-8"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; check that it is what it should be"
    if isinstance(error, ImportError):
        return f"a package is missing or broken ({text[:200]}); install llmqat again, by pip install --force-reinstall"
    return None
