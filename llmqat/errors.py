"""The one exception of expected failures, and the warning of old spellings."""


class LlmqatError(ValueError):
    """Something the caller can mend: the message says what is wrong, which limit it breaks, and the remedy.

    The command line prints it as one line and exits with 1.
    """


class LlmqatDeprecationWarning(DeprecationWarning):
    """An old spelling that is accepted for one version; the message names the new one."""
