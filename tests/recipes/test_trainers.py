"""The recipes for other trainers, run as a user runs them, on the tiny model."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import llmqat

FOLDER = Path(__file__).parents[2] / "recipes" / "trainers"


@pytest.fixture
def run_script(monkeypatch, tmp_path, capsys):
    """``run_script(name, arguments)``: what a script printed."""

    def make(name, *arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        runpy.run_path(str(FOLDER / name), run_name="__main__")
        return capsys.readouterr().out

    return make


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "sums.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"add {i}", "completion": str(i + 1)}) + "\n" for i in range(60)))
    return path


@pytest.mark.parametrize(
    ("name", "data"), [("hf_trainer.py", "text_file"), ("hf_trainer.py", "talks"), ("trl_sft.py", "talks")]
)
def test_a_recipe_trains_packs_and_verifies(request, run_script, model_dir, tmp_path, name, data):
    dataset = request.getfixturevalue(data)
    options = ("--dataset", dataset, "--max-steps", 2, "--length", 64, "--output", tmp_path / "out")
    printed = run_script(name, "--model", model_dir, *options)
    assert "codes equal: True, scales equal: True, 14 layers" in printed
    assert re.search(r"'train_loss': '?[\d.]+", printed)
    assert llmqat.verify(tmp_path / "out").ok


def test_every_script_is_run_here():
    assert {path.name for path in FOLDER.glob("*.py")} == {"hf_trainer.py", "trl_sft.py"}
