"""Attacks by hypothesis: a few examples a test in the short run, `LLMQAT_FUZZ_EXAMPLES` of each in a long one."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from hypothesis import HealthCheck, settings

EXAMPLES = int(os.environ.get("LLMQAT_FUZZ_EXAMPLES", "25"))
SHORT = 25  # up to this many, always the same ones: a short run finds today what it found yesterday
SECONDS = 20  # beyond these an example hangs

settings.register_profile(
    "llmqat",
    max_examples=EXAMPLES,
    derandomize=EXAMPLES <= SHORT,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("llmqat")


@contextmanager
def time_limit(seconds: int = SECONDS) -> Iterator[None]:
    """Fail what takes longer: nothing that is read or computed may hang."""

    def late(*_: object) -> None:
        raise TimeoutError(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
