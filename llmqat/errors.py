"""The one exception of expected failures."""


class LlmqatError(ValueError):
    """Something the caller can mend: the message says what is wrong, which limit it breaks, and the remedy.

    The command line prints it as one line and exits with 1.
    """
