from types import SimpleNamespace

import pytest

from eval._peers import sections
from eval._peers.bench import QUICK, Bench
from eval._peers.catalog import A8, BF16, GPTQMODEL, READ
from eval._peers.client import PeerError

LAYERS = {"tiny": {"square": (64, 128)}}
ANSWERS = {
    "open": {"bytes": 1},
    "gb_s": 30.0,
    "open_layer": {"bytes": 3_000_000, "copies": 2},
    "time_layer": 1e-3,
    "build_model": {"file_bytes": 5},
    "open_model": {"load_seconds": 0.5},
    "prefill_tok_s": 100.0,
    "decode_tok_s": 10.0,
    "close": None,
}


class FakeClient:
    """Answers at once, and fails in the named calls."""

    def __init__(self, name, calls, failing):
        self.name, self.calls, self.failing = name, calls, failing
        self.about = {"version": "1"}
        self.process = SimpleNamespace(pid=0, poll=lambda: None)

    def call(self, name, **args):
        self.calls.append((self.name, name))
        if name in self.failing.get(self.name, ()):
            raise PeerError(f"no {name}")
        return ANSWERS[name]

    def close(self):
        self.calls.append((self.name, "end"))


@pytest.fixture
def bench_of():
    def make(calls, failing=None, absent=()):
        def start(name):
            if name in absent:
                raise PeerError("not installed")
            return FakeClient(name, calls, failing or {})

        bench = Bench(QUICK, start, limit=2.0, say=lambda line: None)
        bench.quiet.ticks = lambda: SimpleNamespace(foreign_share=lambda earlier: 0.0)
        return bench

    return make


def rows_of(rows, **where):
    return [row for row in rows if all(row.get(key) == value for key, value in where.items())]


def test_rounds_alternate_and_turn_round(bench_of):
    calls = []
    with bench_of(calls) as bench:
        rows = sections.measure_layers(bench, [READ, A8, BF16], LAYERS)
    timed = [name for name, call in calls if call in ("time_layer", "gb_s")]
    assert timed == [A8, BF16, READ, READ, BF16, A8] * len(QUICK.rows)
    (row,) = rows_of(rows, peer=A8, m=16)
    assert row["weight_gb_s"] == pytest.approx(3.0)
    assert row["gflop_s"] == pytest.approx(2 * 16 * 64 * 128 / 1e-3 / 1e9)
    assert row["seconds"]["values"] == [1e-3] * QUICK.repeats
    assert rows_of(rows, peer=READ, m=1)[0]["gb_s"]["median"] == 30.0
    assert calls[-3:] == [(name, "end") for name in (READ, A8, BF16)]


def test_an_absent_peer_is_noted_and_the_others_run(bench_of):
    with bench_of([], absent=[GPTQMODEL]) as bench:
        rows = sections.measure_layers(bench, [A8, GPTQMODEL], LAYERS)
    assert bench.absent == {GPTQMODEL: "not installed"}
    assert {row["peer"] for row in rows} == {A8}


@pytest.mark.parametrize("call", ["open_layer", "time_layer"])
def test_a_peer_that_fails_on_a_layer_is_a_failed_row(bench_of, call):
    with bench_of([], failing={BF16: [call]}) as bench:
        rows = sections.measure_layers(bench, [A8, BF16], LAYERS)
    assert [row["failed"] for row in rows_of(rows, peer=BF16)] == [f"no {call}"]
    assert len(rows_of(rows, peer=A8)) == len(QUICK.rows)


def test_models_are_all_written_before_one_is_loaded_and_freed_after(bench_of):
    calls = []
    with bench_of(calls, failing={BF16: ["decode_tok_s"]}) as bench:
        rows = sections.measure_models(bench, [READ, A8, BF16], ["tiny"])
    order = [pair for pair in calls if pair[1] in ("build_model", "open_model", "close")]
    assert order == [
        (A8, "build_model"),
        (BF16, "build_model"),
        (A8, "open_model"),
        (BF16, "open_model"),
        (A8, "close"),
        (BF16, "close"),
    ]
    (decode,) = rows_of(rows, peer=A8, task="decode")
    assert (decode["tok_s"]["median"], decode["file_bytes"], decode["load_seconds"]) == (10.0, 5, 0.5)
    assert rows_of(rows, peer=BF16, task="prefill 32")
    assert [row["failed"] for row in rows_of(rows, model="tiny", peer=BF16) if "failed" in row] == ["no decode_tok_s"]


def test_the_busy_process_runs_only_beside_contended_samples(bench_of, monkeypatch):
    states, calls = [], []

    class Busy:
        pid = 0

        def __init__(self, command):
            assert sections.BUSY in command

        def send_signal(self, signal):
            states.append(signal.name)
            calls.append(("busy", signal.name))

        def kill(self):
            states.append("killed")

        def wait(self):
            pass

    monkeypatch.setattr(sections.subprocess, "Popen", Busy)
    with bench_of(calls) as bench:
        (row,) = sections.measure_contention(bench, [A8], "tiny")
        assert bench.extra_pids == []
    assert states == ["SIGSTOP", "SIGCONT"] * QUICK.repeats + ["killed"]
    decoded = [calls[i - 1][1] for i, call in enumerate(calls) if call == (A8, "decode_tok_s")]
    assert decoded == ["SIGSTOP", "SIGCONT"] * QUICK.repeats
    assert row["quiet"]["median"] == row["contended"]["median"] == 10.0


def test_a_worker_that_ended_is_started_again(bench_of):
    calls = []
    with bench_of(calls) as bench:
        assert bench.running([A8]) == [A8]
        first = bench.clients[A8]
        assert bench.running([A8]) == [A8]
        assert bench.clients[A8] is first
        first.process.poll = lambda: -11
        bench.running([A8])
        assert bench.clients[A8] is not first
