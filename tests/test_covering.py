"""The cases that `every` chooses: no meeting is left out, and few are made twice."""

from itertools import combinations, product

import pytest

from tests.covering import every

PARAMETERS = [2, 3, 4, 8], [True, False], [-1, 8, 16], ["full", "lora"], ["float32", "bfloat16"]


@pytest.mark.parametrize(("together", "most"), [(1, 4), (2, 12), (3, 27)])
def test_all_values_meet(together, most):
    cases = every(together, *PARAMETERS)
    assert len(cases) == len(set(cases)) <= most
    for places in combinations(range(len(PARAMETERS)), together):
        met = {tuple(case[place] for place in places) for case in cases}
        assert met == set(product(*(PARAMETERS[place] for place in places)))


def test_all_together_are_all_combinations():
    assert every(3, "ab", [1, 2], "cde") == list(product("ab", [1, 2], "cde"))


def test_values_of_any_kind():
    """Those that are equal to others, and those that have no hash."""
    assert every(2, [1, True], [{}, []]) == [(1, {}), (1, []), (True, {}), (True, [])]
