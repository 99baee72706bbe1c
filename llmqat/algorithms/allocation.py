"""Divide an average number of bits over the layers of a model, by what each loses at fewer bits."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """Layers that get the same bits, because they read the same tensor and engines run them as one.

    Attributes:
        layers: their names.
        parameters: weights of all of them.
        loss: of the model, for each number of bits that the unit may have: the fewer, the larger.
    """

    layers: tuple[str, ...]
    parameters: int
    loss: Mapping[int, float]


class Step(NamedTuple):
    """More bits for a unit: how many it has then, and what each of the added bits takes from the loss."""

    gain: float
    unit: int
    bits: int


def allocate(units: Sequence[Unit], average: float) -> list[int]:
    """Bits of each unit so that the sum of their losses is small and their average, over weights, at most `average`.

    The multiple-choice knapsack by its linear relaxation (Sinha and Zoltners, "The Multiple-Choice Knapsack Problem",
    1979): all begin with the fewest bits; steps along the lower convex hull of each unit's losses are taken in the
    order of what an added bit gains, and those that no longer fit are passed over. The relaxation is off by less than
    one step of one unit.

    Args:
        units: each with a loss for the same numbers of bits.
        average: bits per weight; at least the fewest bits.
    """
    chosen = [min(unit.loss) for unit in units]
    room = average * sum(unit.parameters for unit in units)
    room -= sum(bits * unit.parameters for bits, unit in zip(chosen, units, strict=True))
    steps = [step for index, unit in enumerate(units) for step in _hull(index, unit)]
    for step in sorted(steps, reverse=True):
        cost = (step.bits - chosen[step.unit]) * units[step.unit].parameters
        if cost <= room:
            chosen[step.unit] = step.bits
            room -= cost
    return chosen


def _hull(index: int, unit: Unit) -> list[Step]:
    """The steps from a unit's fewest bits to its most that each gain less than the one before: its convex hull."""
    steps, bits = [], min(unit.loss)
    while bits < max(unit.loss):
        more = [count for count in unit.loss if count > bits]
        step = max(
            Step((unit.loss[bits] - unit.loss[count]) / (count - bits) / unit.parameters, index, count)
            for count in more
        )
        steps.append(step)
        bits = step.bits
    return steps
