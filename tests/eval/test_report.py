import pytest

from eval._peers import report
from eval._peers.bench import summary
from eval._peers.catalog import A8, A16, BF16, Q4_0, READ
from eval._peers.quiet import Sample


def found(*values, foreign=0.0):
    return summary([Sample(value, foreign, 1) for value in values])


def layer(peer, m, seconds, size=1_000_000_000):
    rates = {"weight_gb_s": size / 1e9 / seconds[0], "gflop_s": 1.0}
    where = {"set": "1b", "layer": "down", "out": 4, "in": 8, "m": m, "peer": peer}
    return {**where, "bytes": size, "seconds": found(*seconds), **rates}


def read(m, *values):
    return {"set": "1b", "layer": "down", "out": 4, "in": 8, "m": m, "peer": READ, "gb_s": found(*values)}


def test_summary_counts_retakes_and_keeps_the_worst_share():
    told = summary([Sample(3.0, 0.01, 1), Sample(1.0, 0.05, 3), Sample(2.0, 0.0, 2)])
    assert (told["median"], told["min"], told["max"], told["foreign"], told["retaken"]) == (2.0, 1.0, 3.0, 0.05, 3)


def test_gemv_is_judged_by_bandwidth_of_the_same_round():
    # 1 GB in 0.04 s is 25 GB/s; in the second round everything is twice as slow, and the ratio the same.
    (verdict,) = report.layer_verdicts([layer(A8, 1, (0.04, 0.08)), read(1, 26.0, 13.0)])
    assert verdict["ratio"] == pytest.approx(25 / 26)
    assert verdict["min"] == pytest.approx(verdict["max"])
    assert (verdict["against"], verdict["target"], verdict["met"]) == (READ, 0.92, True)


def test_gemm_is_judged_by_time_whatever_the_bytes():
    rows = [layer(A8, 512, (1.0,)), layer(A16, 512, (2.0,)), layer(BF16, 512, (1.3,), size=4_000_000_000)]
    told = {row["peer"]: row for row in report.layer_verdicts(rows)}
    assert told[A8]["ratio"] == pytest.approx(1.3)
    assert not told[A8]["met"]
    assert told[A16]["ratio"] == pytest.approx(0.65)
    assert "short by 7%" in report.target_table([told[A8]])


def test_models_are_judged_where_both_sides_were_measured():
    rows = [
        {"model": "llama-1b", "task": "decode", "peer": A8, "tok_s": found(44.0, 40.0)},
        {"model": "llama-1b", "task": "decode", "peer": Q4_0, "tok_s": found(36.0, 36.0)},
        {"model": "llama-1b", "task": "prefill 128", "peer": A8, "tok_s": found(900.0, 900.0)},
        {"model": "llama-1b", "peer": BF16, "failed": "no memory"},
    ]
    (verdict,) = report.model_verdicts(rows)
    assert (verdict["task"], verdict["against"], verdict["met"]) == ("decode", Q4_0, False)
    assert verdict["ratio"] == pytest.approx(42 / 36)


def test_contention_is_a_ratio_to_quiet():
    rows = [{"model": "llama-1b", "peer": A8, "quiet": found(40.0, 40.0), "contended": found(24.0, 20.0)}]
    (verdict,) = report.contention_verdicts(rows)
    assert verdict["ratio"] == pytest.approx(0.55)
    assert verdict["met"]


def test_tables_have_a_column_for_each_peer_and_a_dash_for_what_is_missing():
    rows = [layer(A8, 1, (0.04,)), read(1, 26.0), layer(BF16, 16, (0.04,))]
    first, second = report.layer_tables(rows)
    assert first.splitlines()[0].split() == ["M", "=", "1", READ, A8]
    assert "40,000 ±0% us 25.0 GB/s" in first
    assert BF16 in second
    table = report.table("x", {"a": {A8: "1"}, "b": {BF16: "2"}})
    assert table.splitlines()[1].split() == ["a", "1", "-"]


def test_disturbed_samples_are_named():
    rows = [{"model": "llama-1b", "task": "decode", "peer": A8, "tok_s": found(1.0, foreign=0.31)}]
    assert report.disturbed(rows, 0.06) == [f"llama-1b decode {A8}: others took 31% of the machine"]
    assert report.disturbed(rows, 0.5) == []
