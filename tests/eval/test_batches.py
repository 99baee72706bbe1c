"""`eval/batches.py`: rates are those of decoding, of all rounds but the first, the engines by turns."""

import importlib
from argparse import Namespace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def test_rates(monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "eval")
    batches, calls = importlib.import_module("batches"), []

    def engine(name, first, token):
        def seconds(batch, new):
            calls.append(name)
            slow = 10 if len(calls) <= 4 else 1  # the round that warms up
            return slow * (first + (new - 1) * token)

        return seconds

    engines = {"llmqat": engine("llmqat", 1.0, 0.5), "vllm": engine("vllm", 3.0, 0.25)}
    rows = batches.measured(engines, Namespace(batches=[8], repeats=2, new=5))
    assert calls == ["llmqat", "llmqat", "vllm", "vllm"] * 3
    rates = {row["engine"]: row["tokens_per_second"] for row in rows}
    assert rates == {"llmqat": pytest.approx([16, 16]), "vllm": pytest.approx([32, 32])}
    assert "llmqat     8 sequences     16.0 tokens/s [16.0, 16.0]" in capsys.readouterr().out
