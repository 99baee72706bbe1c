"""The one exception of expected failures, the warning of old spellings, and what keeps messages in one line."""

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
