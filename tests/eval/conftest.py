"""Fixtures of the tests of the scripts under `eval/`."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EVAL = Path(__file__).parents[2] / "eval"


@pytest.fixture
def script(model_dir, text_file, tmp_path, monkeypatch, capsys):
    """``script(name, options)(*more)``: runs a script on a tiny model; returns its JSON, and what it printed."""
    monkeypatch.syspath_prepend(EVAL)

    def of(name, options):
        output = tmp_path / "results.json"
        always = [EVAL / name, "--model", model_dir, "--dataset", text_file, "--output", output, *options.split()]

        def run(*more):
            monkeypatch.setattr(sys, "argv", [*map(str, always), *more])
            capsys.readouterr()
            runpy.run_path(str(EVAL / name), run_name="__main__")
            return json.loads(output.read_text()), capsys.readouterr().out

        return run

    return of
