"""The three things that are measured: single layers, whole models, and decoding beside a busy process."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGCONT, SIGSTOP
from typing import Any

from .bench import Bench, summary
from .catalog import PEERS, READ
from .quiet import Sample

BUSY = "while True: pass"
LEAST_BUFFER = 1 << 21
Row = dict[str, Any]


def measure_layers(bench: Bench, names: list[str], layers: dict[str, dict[str, tuple[int, int]]]) -> list[Row]:
    """One row for each layer, M and peer: seconds of a call, GB/s of stored weights, GFLOP/s."""
    rows: list[Row] = []
    settings = bench.settings
    running = open_read(bench, [name for name in names if PEERS[name].ops])
    for group, shapes in layers.items():
        for layer, (out, inner) in shapes.items():
            where = {"set": group, "layer": layer, "out": out, "in": inner}
            failures: dict[str, str] = {}
            opening = {"out": out, "inner": inner, "rows": list(settings.rows), "cold_bytes": settings.cold_bytes}
            peers = bench.running([name for name in running if name != READ])
            opened = bench.each(peers, "open_layer", failures, **opening)
            for m in settings.rows:
                bench.say(f"{group} {layer} ({out} x {inner}), M = {m}")
                arguments = {"rows": m, "seconds": settings.seconds}
                found = bench.rounds(with_read(bench, ("time_layer", arguments), opened, failures), failures)
                rows += [_layer_row({**where, "m": m}, name, found, opened) for name in found]
            rows += [{**where, "peer": name, "failed": why} for name, why in failures.items()]
            bench.each(list(opened), "close", {})
    return rows


def open_read(bench: Bench, names: list[str]) -> list[str]:
    """The peers that run; the bandwidth worker among them has its buffer."""
    running = bench.running(names)
    if READ in running:
        bench.clients[READ].call("open", buffer_bytes=max(bench.settings.cold_bytes, LEAST_BUFFER))
    return running


def with_read(
    bench: Bench, call: tuple[str, dict[str, Any]], opened: dict[str, Any], failures: dict[str, str]
) -> dict[str, tuple[str, dict[str, Any]]]:
    """The same call for every peer that has not failed, and a reading of the bandwidth in the same rounds."""
    calls = {name: call for name in opened if name not in failures}
    if READ in bench.clients:
        calls[READ] = ("gb_s", {"seconds": bench.settings.seconds})
    return calls


def _layer_row(where: Row, peer: str, found: dict[str, Row], opened: dict[str, Any]) -> Row:
    row = {**where, "peer": peer}
    if peer == READ:
        return {**row, "gb_s": found[peer]}
    seconds, size = found[peer]["median"], opened[peer]["bytes"]
    flops = 2 * where["m"] * where["out"] * where["in"]
    rates = {"weight_gb_s": size / seconds / 1e9, "gflop_s": flops / seconds / 1e9}
    return {**row, "bytes": size, "copies": opened[peer]["copies"], "seconds": found[peer], **rates}


@contextmanager
def models_of(bench: Bench, names: list[str], shape: str) -> Iterator[tuple[dict[str, Row], dict[str, str]]]:
    """Workers with the model of a shape built and loaded: what each says of it, and the failures so far."""
    failures: dict[str, str] = {}
    peers = [name for name in open_read(bench, [name for name in names if PEERS[name].models]) if name != READ]
    bench.say(f"writing and loading {shape}")
    built = bench.each(peers, "build_model", failures, shape=shape)  # takes more memory than running: all of it first
    loaded = bench.each(list(built), "open_model", failures, shape=shape)
    try:
        yield {name: {**built[name], **about} for name, about in loaded.items()}, failures
    finally:
        bench.each([name for name in loaded if bench.clients[name].process.poll() is None], "close", {})


def measure_models(bench: Bench, names: list[str], shapes: list[str]) -> list[Row]:
    """One row for each model shape, measurement and peer, in tokens per second."""
    rows: list[Row] = []
    settings = bench.settings
    for shape in shapes:
        with models_of(bench, names, shape) as (opened, failures):
            tasks = {f"prefill {n}": ("prefill_tok_s", settings.prefill(n)) for n in settings.prompts}
            tasks["decode"] = ("decode_tok_s", settings.decoding)
            for task, call in tasks.items():
                bench.say(f"{shape}, {task}")
                where = {"model": shape, "task": task}
                for name, found in bench.rounds(with_read(bench, call, opened, failures), failures).items():
                    unit = "gb_s" if name == READ else "tok_s"
                    rows.append({**where, "peer": name, unit: found, **opened.get(name, {})})
            rows += [{"model": shape, "peer": name, "failed": why} for name, why in failures.items()]
    return rows


def measure_contention(bench: Bench, names: list[str], shape: str) -> list[Row]:
    """Decoding with the cores to itself, and beside one busy process that is free to move between them, by turns."""
    rows: list[Row] = []
    with models_of(bench, [name for name in names if name != READ], shape) as (opened, failures):
        samples: dict[str, dict[str, list[Sample]]] = {name: {"quiet": [], "contended": []} for name in opened}
        busy = subprocess.Popen([sys.executable, "-c", BUSY])
        bench.extra_pids.append(busy.pid)
        bench.say(f"{shape}, decode alone and beside a busy process")
        try:
            for _ in range(bench.settings.repeats):
                for name in opened:
                    for state, signal in (("quiet", SIGSTOP), ("contended", SIGCONT)):
                        busy.send_signal(signal)
                        if name not in failures:
                            bench.take(samples[name][state], name, "decode_tok_s", bench.settings.decoding, failures)
        finally:
            busy.kill()
            busy.wait()
            bench.extra_pids.remove(busy.pid)
        for name in opened:
            if name not in failures:
                rows.append({"model": shape, "peer": name, **{s: summary(taken) for s, taken in samples[name].items()}})
        rows += [{"model": shape, "peer": name, "failed": why} for name, why in failures.items()]
    return rows
