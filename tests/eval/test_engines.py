"""The script that runs exported models in their engines, on those that need no engine of their own."""

import json
import runpy
import sys
from pathlib import Path

import pytest

import llmqat

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "engines.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize(
    ("config", "engine"),
    [({"quantization": {}}, "Mlx"), ({"quantization_config": {}}, "GptqModel"), ({}, "Transformers")],
)
def test_the_engine_is_found_by_what_lies_there(script, tmp_path, config, engine):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert script["engine_of"](tmp_path) is script[engine]
    (tmp_path / "model.gguf").write_bytes(b"")
    assert script["engine_of"](tmp_path) is script["LlamaCpp"]


def test_a_dense_export_says_what_the_packed_model_says(finished, tmp_path, monkeypatch, capsys):
    llmqat.export(finished, "dense", tmp_path / "out")
    monkeypatch.setattr(sys, "argv", ["engines.py", str(finished), str(tmp_path / "out"), "--new-tokens", "8"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    row = [cell.strip() for cell in capsys.readouterr().out.strip().split("|")[1:-1]]
    assert row[0].startswith("transformers ")
    assert row[1:3] == ["5/5", "5/5"]
    assert float(row[3]) < 1e-6
    assert row[4] == "100.0%"
