"""Rates from repeated calls. Standard library only."""

from collections.abc import Callable


def mean_rate(tokens: int, measure: Callable[[], float], seconds: float) -> float:
    """Tokens a second over repeated calls of `measure`, which returns seconds, until they add up to `seconds`.

    A sample shorter than that is too short for its share of foreign CPU time to be known.
    """
    taken, calls = 0.0, 0
    while taken < seconds:
        taken += measure()
        calls += 1
    return tokens * calls / taken
