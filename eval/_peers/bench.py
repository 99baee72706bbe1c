"""The running peers, and rounds over them: every peer once per round, so that what drifts drifts for all of them."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from .client import Client, PeerError
from .quiet import Quiet, Sample


@dataclass(frozen=True)
class Settings:
    """How long and how often.

    Attributes:
        repeats: rounds.
        seconds: least time of a sample of single layers.
        cold_bytes: packed weights that a layer is called over in turn, more than caches hold.
        rows: values of M.
        prompts: prompt lengths whose prefill is timed.
        new_tokens: steps of a decoding sample, after a prompt of `decode_prompt`.
    """

    repeats: int = 7
    seconds: float = 0.3
    cold_bytes: int = 512 << 20
    rows: tuple[int, ...] = (1, 4, 16, 128, 512)
    prompts: tuple[int, ...] = (128, 512, 2000)
    new_tokens: int = 48
    decode_prompt: int = 16

    def prefill(self, prompt: int) -> dict[str, Any]:
        """Arguments of a prefill sample."""
        return {"prompt": prompt, "seconds": self.seconds}

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of a decoding sample."""
        return {"prompt": self.decode_prompt, "tokens": self.new_tokens, "seconds": self.seconds}


QUICK = Settings(
    repeats=2, seconds=0.02, cold_bytes=1 << 20, rows=(1, 16), prompts=(32,), new_tokens=4, decode_prompt=8
)


@dataclass
class Bench:
    """The running peers, what went wrong with others, and how samples are taken."""

    settings: Settings
    start: Callable[[str], Client]
    limit: float
    patience: float = 10.0
    say: Callable[[str], None] = print
    clients: dict[str, Client] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.extra_pids: list[int] = []
        self.quiet = Quiet(self.limit, self.pids, patience=self.patience)

    def pids(self) -> list[int]:
        """Processes whose CPU time is ours."""
        return [*(client.process.pid for client in self.clients.values()), *self.extra_pids]

    def running(self, names: list[str]) -> list[str]:
        """Those of the named peers that have a worker, started or started anew where needed; the rest is absent."""
        for name in names:
            if name in self.clients and self.clients[name].process.poll() is None:
                continue
            self.say(f"starting {name}")
            try:
                self.clients[name] = self.start(name)
                self.about[name] = self.clients[name].about
            except PeerError as error:
                self.clients.pop(name, None)
                self.absent[name] = str(error)
                self.say(f"{name} is absent: {error}")
        return [name for name in names if name in self.clients]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for client in self.clients.values():
            client.close()
        self.clients.clear()

    def each(self, names: list[str], what: str, failures: dict[str, str], **args: Any) -> dict[str, Any]:
        """Call a method of every named peer; what fails is noted in `failures`."""
        values = {}
        for name in names:
            try:
                values[name] = self.clients[name].call(what, **args)
            except PeerError as error:
                failures[name] = str(error)
                self.say(f"{name} failed: {error}")
        return values

    def take(
        self, samples: list[Sample], name: str, method: str, args: dict[str, Any], failures: dict[str, str]
    ) -> None:
        """Add a sample of a peer, or note how it failed."""
        try:
            samples.append(self.quiet.sample(lambda: self.clients[name].call(method, **args)))
        except PeerError as error:
            failures[name] = str(error)
            self.say(f"{name} failed: {error}")

    def rounds(
        self, calls: dict[str, tuple[str, dict[str, Any]]], failures: dict[str, str]
    ) -> dict[str, dict[str, Any]]:
        """Samples of every peer in alternation, summed up by `summary`; `calls` is peer -> method and arguments."""
        samples: dict[str, list[Sample]] = {name: [] for name in calls}
        for turn in range(self.settings.repeats):
            names = list(calls)
            for name in names if turn % 2 == 0 else reversed(names):  # no peer always follows the same one
                if name not in failures:
                    method, args = calls[name]
                    self.take(samples[name], name, method, args, failures)
        return {name: summary(taken) for name, taken in samples.items() if name not in failures}


def summary(samples: list[Sample]) -> dict[str, Any]:
    """Median, range and all values; the greatest foreign share among those that stood, and the samples taken again."""
    values = [sample.value for sample in samples]
    return {
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": values,
        "foreign": max(sample.foreign for sample in samples),
        "retaken": sum(sample.takes - 1 for sample in samples),
    }
