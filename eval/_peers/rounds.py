"""The measurements: every peer once per round, so that what drifts drifts for all of them."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from signal import SIGCONT, SIGSTOP
from typing import Any

from .catalog import PEERS, READ
from .client import Client, PeerError
from .quiet import Quiet, Sample

BUSY = "while True: pass"


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
    prompts: tuple[int, ...] = (128, 512)
    new_tokens: int = 48
    decode_prompt: int = 16

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
    say: Callable[[str], None] = print
    clients: dict[str, Client] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    about: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.extra_pids: list[int] = []
        self.quiet = Quiet(self.limit, lambda: [*(c.process.pid for c in self.clients.values()), *self.extra_pids])

    @contextmanager
    def peers(self, names: list[str]) -> Iterator[None]:
        """Workers of these peers; those that do not start are noted as absent."""
        with ExitStack() as stack:
            for name in names:
                self.say(f"starting {name}")
                try:
                    self.clients[name] = stack.enter_context(self.start(name))
                    self.about[name] = self.clients[name].about
                except PeerError as error:
                    self.absent[name] = str(error)
                    self.say(f"{name} is absent: {error}")
            try:
                yield
            finally:
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

    def rounds(
        self, calls: dict[str, tuple[str, dict[str, Any]]], failures: dict[str, str]
    ) -> dict[str, dict[str, Any]]:
        """Samples of every peer in alternation, summed up by `summary`; `calls` is peer -> method and arguments."""
        samples: dict[str, list[Sample]] = {name: [] for name in calls}
        for turn in range(self.settings.repeats):
            names = list(calls)
            for name in names if turn % 2 == 0 else reversed(names):  # no peer always follows the same one
                if name in failures:
                    continue
                method, args = calls[name]
                try:
                    samples[name].append(
                        self.quiet.sample(lambda n=name, m=method, a=args: self.clients[n].call(m, **a))
                    )
                except PeerError as error:
                    failures[name] = str(error)
                    self.say(f"{name} failed: {error}")
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


def measure_layers(bench: Bench, names: list[str], layers: dict[str, dict[str, tuple[int, int]]]) -> list[dict]:
    """One row for each layer, M and peer: seconds of a call, GB/s of stored weights, GFLOP/s."""
    rows: list[dict] = []
    settings = bench.settings
    with bench.peers([name for name in names if PEERS[name].ops]):
        torch_like = [name for name in bench.clients if name != READ]
        if READ in bench.clients:
            bench.clients[READ].call("open", buffer_bytes=max(settings.cold_bytes, 1 << 21))
        for group, shapes in layers.items():
            for layer, (out, inner) in shapes.items():
                where = {"set": group, "layer": layer, "out": out, "in": inner}
                failures: dict[str, str] = {}
                opening = {"out": out, "inner": inner, "rows": list(settings.rows), "cold_bytes": settings.cold_bytes}
                opened = bench.each(torch_like, "open_layer", failures, **opening)
                for m in settings.rows:
                    bench.say(f"{group} {layer} ({out} x {inner}), M = {m}")
                    found = _layer_rounds(bench, list(opened), m, failures)
                    rows += [_layer_row({**where, "m": m}, name, found, opened) for name in found]
                rows += [{**where, "peer": name, "failed": why} for name, why in failures.items()]
                bench.each(list(opened), "close", {})
    return rows


def _layer_rounds(bench: Bench, names: list[str], m: int, failures: dict[str, str]) -> dict[str, dict[str, Any]]:
    seconds = bench.settings.seconds
    calls = {name: ("time_layer", {"rows": m, "seconds": seconds}) for name in names if name not in failures}
    if READ in bench.clients:
        calls[READ] = ("gb_s", {"seconds": seconds})
    return bench.rounds(calls, failures)


def _layer_row(where: dict[str, Any], peer: str, found: dict[str, dict], opened: dict[str, Any]) -> dict[str, Any]:
    row = {**where, "peer": peer}
    if peer == READ:
        return {**row, "gb_s": found[peer]}
    seconds, size = found[peer]["median"], opened[peer]["bytes"]
    flops = 2 * where["m"] * where["out"] * where["in"]
    rates = {"weight_gb_s": size / seconds / 1e9, "gflop_s": flops / seconds / 1e9}
    return {**row, "bytes": size, "copies": opened[peer]["copies"], "seconds": found[peer], **rates}


def measure_models(bench: Bench, names: list[str], shapes: list[str]) -> list[dict]:
    """One row for each model shape, measurement and peer, in tokens per second."""
    rows: list[dict] = []
    settings = bench.settings
    for shape in shapes:
        with open_models(bench, [name for name in names if PEERS[name].models], shape) as (opened, failures):
            tasks = {
                f"prefill {n}": ("prefill_tok_s", {"prompt": n, "seconds": settings.seconds}) for n in settings.prompts
            }
            tasks["decode"] = ("decode_tok_s", settings.decoding)
            for task, call in tasks.items():
                bench.say(f"{shape}, {task}")
                calls = {name: call for name in opened if name not in failures}
                if READ in bench.clients:
                    calls[READ] = ("gb_s", {"seconds": settings.seconds})
                where = {"model": shape, "task": task}
                for name, found in bench.rounds(calls, failures).items():
                    unit = "gb_s" if name == READ else "tok_s"
                    rows.append({**where, "peer": name, unit: found, **opened.get(name, {})})
            rows += [{"model": shape, "peer": name, "failed": why} for name, why in failures.items()]
    return rows


@contextmanager
def open_models(
    bench: Bench, names: list[str], shape: str
) -> Iterator[tuple[dict[str, dict[str, Any]], dict[str, str]]]:
    """Workers with the model of a shape built and loaded: what each says of it, and the failures so far."""
    failures: dict[str, str] = {}
    with bench.peers(names):
        if READ in bench.clients:
            bench.clients[READ].call("open", buffer_bytes=max(bench.settings.cold_bytes, 1 << 21))
        bench.say(f"writing and loading {shape}")
        # Writing takes more memory than running: all of it comes first.
        built = bench.each([name for name in bench.clients if name != READ], "build_model", failures, shape=shape)
        loaded = bench.each(list(built), "open_model", failures, shape=shape)
        yield {name: {**built[name], **about} for name, about in loaded.items()}, failures


def measure_contention(bench: Bench, names: list[str], shape: str) -> list[dict]:
    """Decoding with the cores to itself, and beside one busy process that is free to move between them, by turns."""
    settings = bench.settings
    rows: list[dict] = []
    with open_models(bench, [name for name in names if PEERS[name].models and name != READ], shape) as (
        opened,
        failures,
    ):
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        bench.extra_pids.append(busy.pid)
        try:
            for name in opened:
                bench.say(f"{shape}, decode of {name}, alone and beside a busy process")
                samples: dict[str, list[Sample]] = {"quiet": [], "contended": []}
                try:
                    for _ in range(settings.repeats):
                        for state, signal in (("quiet", SIGSTOP), ("contended", SIGCONT)):
                            busy.send_signal(signal)
                            call = bench.clients[name].call
                            samples[state].append(
                                bench.quiet.sample(lambda c=call: c("decode_tok_s", **settings.decoding))
                            )
                        busy.send_signal(SIGSTOP)
                except PeerError as error:
                    failures[name] = str(error)
                    continue
                found = {state: summary(taken) for state, taken in samples.items()}
                rows.append({"model": shape, "peer": name, **{state: found[state] for state in found}})
        finally:
            busy.kill()
            busy.wait()
            bench.extra_pids.remove(busy.pid)
        rows += [{"model": shape, "peer": name, "failed": why} for name, why in failures.items()]
    return rows
