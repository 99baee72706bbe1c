import itertools
import random

import pytest

from llmqat.algorithms.allocation import Unit, allocate


def spent(units, chosen):
    return sum(bits * unit.parameters for bits, unit in zip(chosen, units, strict=True))


def lost(units, chosen):
    return sum(unit.loss[bits] for bits, unit in zip(chosen, units, strict=True))


@pytest.mark.parametrize("average", [2.0, 2.7, 3.1, 4.0, 5.5, 8.0])
def test_no_other_choice_is_better_by_more_than_a_step(average):
    draw = random.Random(0)
    for _ in range(20):
        units = []
        for index in range(5):
            worst = draw.uniform(0.1, 5)
            loss = {2: worst, 3: worst * draw.uniform(0.2, 0.9), 4: worst * draw.uniform(0.05, 0.19), 8: worst / 200}
            units.append(Unit((str(index),), draw.choice([64, 128, 256]), loss))
        weights = sum(unit.parameters for unit in units)
        chosen = allocate(units, average)
        assert spent(units, chosen) <= average * weights
        choices = itertools.product((2, 3, 4, 8), repeat=5)
        best = min(lost(units, other) for other in choices if spent(units, other) <= average * weights)
        assert best <= lost(units, chosen) <= best + max(unit.loss[2] for unit in units)


def test_what_loses_most_gets_the_bits():
    units = [
        Unit(("a",), 100, {4: 1.0, 8: 0.0}),
        Unit(("b",), 100, {4: 5.0, 8: 0.0}),
        Unit(("c",), 100, {4: 3.0, 8: 0}),
    ]
    assert allocate(units, 4.0) == [4, 4, 4]
    assert allocate(units, 4 + 4 / 3) == [4, 8, 4]
    assert allocate(units, 8.0) == [8, 8, 8]


def test_a_step_off_the_convex_hull_is_not_taken():
    """3 bits gain nothing here until there are 4: the hull goes from 2 to 4."""
    units = [Unit(("a",), 100, {2: 4.0, 3: 3.9, 4: 0.0}), Unit(("b",), 100, {2: 1.0, 3: 0.2, 4: 0.1})]
    assert allocate(units, 3.0) == [4, 2]


def test_what_fits_is_taken_behind_what_does_not():
    units = [Unit(("large",), 1000, {4: 9.0, 8: 0.0}), Unit(("small",), 10, {4: 0.01, 8: 0.0})]
    assert allocate(units, 4.5) == [4, 8]
