"""Combinations of parameters that are too many to try them all."""

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def every(together: int, *parameters: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases in which any values of any `together` parameters meet at least once, for ``pytest.mark.parametrize``.

    With 2, every value of a parameter meets every value of each other one. The choice is the same in every process:
    of all combinations the one that brings most meetings that were not there yet, and of these the first.
    """
    places = list(combinations(range(len(parameters)), together))
    left = dict.fromkeys(product(*map(range, map(len, parameters))))
    missing = {(place, tuple(case[i] for i in place)) for case in left for place in places}
    chosen = []
    while missing:
        meetings = {case: [(place, tuple(case[i] for i in place)) for place in places] for case in left}
        best = max(left, key=lambda case: sum(meeting in missing for meeting in meetings[case]))
        missing.difference_update(meetings[best])
        del left[best]
        chosen.append(best)
    return [tuple(values[i] for values, i in zip(parameters, case, strict=True)) for case in sorted(chosen)]
