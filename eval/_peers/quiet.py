"""Samples that no other process disturbed: the share of foreign CPU time is read from ``/proc`` around each."""

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")
SETTLE = 0.03  # seconds that OpenMP threads of the last peer may go on spinning
RESOLUTION = 2  # ticks by which two readings may differ from the truth
WINDOW = 0.3  # seconds over which quiet is judged before a sample is taken again


@dataclass(frozen=True)
class Ticks:
    """CPU time so far, in clock ticks: of the whole machine, stolen time included, and of our processes."""

    total: int
    busy: int
    own: int

    def foreign_share(self, earlier: "Ticks") -> float:
        """Share of the machine that others took between two readings."""
        busy, own, total = self.busy - earlier.busy, self.own - earlier.own, self.total - earlier.total
        return max(0, busy - own - RESOLUTION) / max(1, total)


def read_ticks(pids: Iterable[int], proc: Path = PROC) -> Ticks:
    """Read ``/proc/stat``, and ``/proc/PID/stat`` of our processes."""
    fields = [int(word) for word in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = fields[3] + fields[4]
    own = 0
    for pid in pids:
        try:
            after_name = (proc / str(pid) / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # ended
            continue
        own += int(after_name[11]) + int(after_name[12])
    return Ticks(sum(fields), sum(fields) - idle, own)


@dataclass(frozen=True)
class Sample:
    """What was measured, the foreign share during it, and how often it was taken."""

    value: Any
    foreign: float
    takes: int


class Quiet:
    """Takes samples, and takes them again when others took more than `limit` of the machine.

    Args:
        limit: greatest foreign share.
        pids: processes that are ours.
        retakes: how often a sample is taken again before the disturbed one stands, with its share on record.
        patience: seconds to wait for quiet before each of them.
    """

    def __init__(
        self, limit: float, pids: Callable[[], Iterable[int]], retakes: int = 5, patience: float = 10.0
    ) -> None:
        self.limit, self.pids, self.retakes, self.patience = limit, pids, retakes, patience

    def ticks(self) -> Ticks:
        """Read the clock ticks now."""
        return read_ticks([os.getpid(), *self.pids()])

    def wait(self) -> None:
        """Sleep until the others are quiet, or patience ends."""
        deadline = time.monotonic() + self.patience
        while time.monotonic() < deadline:
            before = self.ticks()
            time.sleep(WINDOW)
            if self.ticks().foreign_share(before) <= self.limit:
                return

    def sample(self, measure: Callable[[], Any]) -> Sample:
        """The first undisturbed result of `measure`, else the least disturbed one."""
        taken: list[Sample] = []
        for take in range(1, self.retakes + 2):
            time.sleep(SETTLE)
            before = self.ticks()
            value = measure()
            taken.append(Sample(value, self.ticks().foreign_share(before), take))
            if taken[-1].foreign <= self.limit:
                break
            if take <= self.retakes:
                self.wait()
        best = min(taken, key=lambda sample: sample.foreign)
        return Sample(best.value, best.foreign, len(taken))
