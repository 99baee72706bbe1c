"""Other tools as rows of the scoreboard: asked for, run, scored, kept by a resume, and refused in one line."""

import json
import sys

import pytest
import torch
from safetensors.torch import save_file

from llmqat.errors import LlmqatError
from llmqat.pipeline import other_python, worker
from llmqat.pipeline.measure_baselines import check_linear, quantized_by
from llmqat.pipeline.run import run
from llmqat.report.schema import REPORT, read
from llmqat.scheme import QuantScheme


@pytest.fixture
def tool(monkeypatch):
    """A tool that finds nothing to round, in this process, and counts its runs."""
    runs = []

    def start(python, folder, failed):
        job = json.loads((folder / worker.JOB).read_text())
        if job["module"] is not None:
            runs.append((python, job))
            save_file(of_float(job), folder / "weights.safetensors")
        (folder / worker.RESULT).write_text(
            json.dumps({"versions": {"auto-round": "0.1"}, "seconds": 0, "cpu_seconds": 0})
        )

    monkeypatch.setattr(other_python, "_start", start)
    return runs


def of_float(job):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    return {f"{name}.weight": model.get_parameter(f"{name}.weight").detach() for name in job["layers"]}


def test_another_tool_is_scored_and_may_be_the_best(small_recipe, tmp_path, tool, capsys):
    recipe = small_recipe(tmp_path / "out", {"eval.baselines": "auto-round=its/python", "train.max_steps": 2})
    measured = run(recipe)
    ((python, job),) = tool
    assert python == "its/python"
    assert (job["threads"], job["device"], job["seed"]) == (torch.get_num_threads(), "cpu", recipe.seed)
    assert job["layers"]["model.layers.0.mlp.up_proj"]["bits"] == 4
    report = read(tmp_path / "out/report.json", REPORT)
    assert report["kl_to_float"]["auto-round"] == pytest.approx(0, abs=1e-6)
    assert report["perplexity"]["auto-round"] == pytest.approx(report["perplexity"]["float"])
    assert report["perplexity"]["llm-compressor"] is None
    del measured.perplexity["rtn"]  # whose perplexity on this text is less than float's
    assert measured.best_ptq() == "auto-round"
    assert report["baselines"]["auto-round"]["versions"] == {"auto-round": "0.1"}
    shown = capsys.readouterr().out
    assert "AutoRound: 0 s, auto-round 0.1; same grid and calibration tokens" in shown
    assert report["recipe"]["eval"]["baselines"] == "auto-round"
    assert "its/python" not in (tmp_path / "out/recipe.yaml").read_text()
    assert not (tmp_path / "out/checkpoint/baselines").exists()


def test_a_resume_does_not_run_it_again(small_recipe, tmp_path, tool, monkeypatch):
    recipe = small_recipe(tmp_path / "out", {"eval.baselines": "auto-round", "train.max_steps": 1})
    with monkeypatch.context() as patch:
        patch.setattr("llmqat.pipeline.run.Run.train_model", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(recipe)
    assert not list((tmp_path / "out").rglob("weights.safetensors"))
    assert run(recipe, resume=True).baselines["auto-round"]["versions"] == {"auto-round": "0.1"}
    assert [python for python, _ in tool] == [sys.executable]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant.act_bits": 8}, "with --act-bits the other tools would have it easier"),
        ({"quant.lm_head_bits": 8}, "with --lm-head-bits the other tools would have it easier"),
        ({"low_memory": True, "train.mode": "lora"}, "--baselines loads the whole float model: leave it out"),
        (
            {},
            r"auto-round needs packages that .* does not have: pip install no_auto_round, or .* --baselines auto",
        ),
    ],
)
def test_refused_before_any_work(small_recipe, tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("llmqat.pipeline.measure_baselines.NEEDS", {"auto-round": ("no_auto_round",)})
    with pytest.raises(LlmqatError, match=message):
        run(small_recipe(tmp_path / "out", {"eval.baselines": "auto-round", **changes}))
    assert not list((tmp_path / "out").glob("*"))


def test_a_tool_that_fails(small_recipe, tmp_path, monkeypatch):
    (tmp_path / "auto_round.py").write_text("raise ValueError('no such scheme')\n__version__ = '0'")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("llmqat.pipeline.measure_baselines.NEEDS", {"auto-round": ("torch",)})
    message = r"auto-round failed \(all it said is in .*log\.txt\): ValueError: no such scheme"
    with pytest.raises(LlmqatError, match=message):
        run(small_recipe(tmp_path / "out", {"eval.baselines": "auto-round"}), train=False)


def test_layers_that_other_tools_do_not_know(tiny_moe):
    layer = "model.layers.0.mlp.experts.0.up_proj"
    with pytest.raises(LlmqatError, match=rf"other tools have no layer {layer} of this model; leave it out"):
        check_linear(tiny_moe("mixtral"), {layer: QuantScheme()})


def test_in_python(model_dir, tool):
    calibration = [torch.arange(64).view(2, 32)]
    found = quantized_by(
        "auto-round", str(model_dir), QuantScheme(4, 32), calibration, overrides={"o_proj": "float"}, steps=7
    )
    ((python, job),) = tool
    assert (python, job["steps"], job["batch"], len(job["layers"])) == (sys.executable, 7, None, 12)
    assert (found.versions, found.seconds) == ({"auto-round": "0.1"}, 0)
    assert found.model.dtype == torch.float32
