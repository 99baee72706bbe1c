"""The sweep over formats and engines: what it runs, where it goes on, and the table that comes of it."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import llmqat
from llmqat.pipeline.engines.table import ENGINES

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "engines.py"
RAN = {
    "versions": {"engine": "1.0"},
    "dtype": "float32",
    "int8": True,
    "same_greedy": 4,
    "tokens_s": 12.3,
    "passages": 5,
    "max_error": 0.25,
    "kl": 1e-3,
    "kl_bound": 2e-3,
    "top1": 0.99,
    "ok": True,
}
MACHINE = {"cpu": "a CPU", "threads": 1, "torch": "2.13.0"}


@pytest.fixture
def sweep(monkeypatch, tmp_path):
    """``sweep(*options)``: runs the script; commands are noted, and answered without an engine."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    commands, said = [], {"line": "vllm cannot run it"}

    def answer(command, cwd, **_):
        commands.append(command[3:])
        if command[command.index("--runtime") + 1] == "vllm":
            return SimpleNamespace(stderr=f"noise\nllmqat: {said['line']}\n")
        (cwd / command[-1]).write_text(json.dumps({"differences": [], "runtime": RAN}))

    monkeypatch.setattr(subprocess, "run", answer)
    (tmp_path / "vllm" / "bin").mkdir(parents=True)
    (tmp_path / "vllm" / "bin" / "python").touch()

    def run(*options, **line):
        commands.clear()
        said.update(line)
        always = ["--scratch", tmp_path / "s", "--output", tmp_path / "r.json", "--environments", tmp_path]
        monkeypatch.setattr(sys, "argv", [str(word) for word in ("engines.py", *always, *options)])
        monkeypatch.setattr(Path, "write_text", no_page(Path.write_text))
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return commands, json.loads((tmp_path / "r.json").read_text())["cells"]

    return run


def no_page(write_text):
    """Leave docs/serve.md as it is."""
    return lambda path, *text, **how: None if path.name == "serve.md" else write_text(path, *text, **how)


def test_a_sweep_measures_every_cell_once(sweep, model_dir):
    options = ("--models", model_dir, "--grids", "4-bits-g32")
    commands, found = sweep(*options, "--engines", "vllm")
    assert commands[0][:4] == ["verify", "packed", "--runtime", "vllm"]
    assert found["tiny 4-bits-g32 packed vllm"] == {
        "command": "llmqat verify packed --runtime vllm",
        "bytes": found["tiny 4-bits-g32 packed vllm"]["bytes"],
        "cpu": llmqat.environment()["cpu"],
        "refused": "vllm cannot run it",
    }
    assert found["tiny 4-bits-g32 dense vllm"]["command"] == "llmqat verify dense --against packed --runtime vllm"
    assert len(commands) == len(found) == 4
    assert sweep(*options, "--engines", "vllm")[0] == []
    assert len(sweep(*options, "--engines", "vllm", "--again", "vllm")[0]) == 4
    with pytest.raises(SystemExit, match="vllm needs packages that it does not have"):
        sweep(*options, "--engines", "vllm", "--again", "vllm", line="vllm needs packages that it does not have")
    with pytest.raises(SystemExit, match=r"gptqmodel has no environment in .*: --install makes it"):
        sweep(*options, "--engines", "gptqmodel")


def test_the_table(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    slow = {key: value for key, value in RAN.items() if key != "tokens_s"} | {"ok": False, "int8": False}
    cells = {
        "llama 4-bits-g32 gguf llama.cpp": {"bytes": 2_000_000, "cpu": "a CPU", "differences": [], "runtime": RAN},
        "llama 4-bits-g32 packed transformers": {"bytes": 1, "runtime": slow},
        "llama 8-bits-g64 packed vllm": {"refused": "vllm has no kernel"},
    }
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script['BEGIN']}old\n{script['END']}\nafter\n")
    script["write_docs"]({"environment": MACHINE, "cells": cells}, page)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert [line for line in lines if line.startswith("| `")] == [
        "| `packed` | engine 1.0, in float32 | llama | 4 bits g32 | its own | 4/5 | 2.5e-01 | "
        "1.0e-03 (2.0e-03) **beyond** | 99.0% | 0.0 |  |",
        "| `gguf` | engine 1.0, in float32, int8 activations | llama | 4 bits g32 | bit for bit | 4/5 | "
        "2.5e-01 | 1.0e-03 (2.0e-03) | 99.0% | 2.0 | 12 (a CPU) |",
    ]
    assert "- `packed`, 8 bits g64: vllm has no kernel" in lines


def test_the_sweep_knows_every_engine(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    found = runpy.run_path(str(SCRIPT))["ENGINES"]
    ours = {(format, name) for name, engine in ENGINES.items() for format in engine.formats} - {("dense", "llmqat")}
    assert {(format, name) for format, names in found.items() for name in names} == ours


def test_what_an_export_refuses_is_a_result(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))

    def refuse(*_):
        raise llmqat.LlmqatError("mlx cannot hold it")

    monkeypatch.setattr(llmqat, "export", refuse, raising=False)
    monkeypatch.setitem(script["compared"].__globals__, "packed_model", lambda *_: tmp_path)
    found = script["compared"](script["Cell"]("m", "8-bits-g64", "mlx", "mlx"), SimpleNamespace(scratch=tmp_path))
    assert found == {"refused": "mlx cannot hold it"}
