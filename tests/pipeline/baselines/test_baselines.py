"""The files of other tools, on stand-ins for them: what each is asked, and what becomes of its answer."""

import ast
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.config import BASELINES
from llmqat.pipeline import baselines
from llmqat.pipeline.baselines import auto_round, llm_compressor
from llmqat.pipeline.measure_baselines import NEEDS

FOLDER = Path(baselines.__file__).parent
GRIDS = {
    "model.layers.0.mlp.up_proj": {"bits": 4, "group_size": 32, "symmetric": True},
    "model.layers.0.mlp.down_proj": {"bits": 8, "group_size": -1, "symmetric": False},
}


def test_every_baseline_has_a_file_that_needs_nothing_of_llmqat():
    files = {path.stem.replace("_", "-"): path for path in FOLDER.glob("*.py") if path.stem != "__init__"}
    assert files.keys() == set(BASELINES) == NEEDS.keys()
    for path in files.values():
        imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        assert not any(str(node.module).startswith("llmqat") for node in imports)


def stand_in(monkeypatch, name, **names):
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def job(tiny_llama, tokenizer, tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    save_file({"input_ids": torch.arange(48).view(3, 16)}, tmp_path / "rows.safetensors")
    places = {"model": str(tmp_path / "float"), "calibration": str(tmp_path / "rows.safetensors")}
    return {**places, "layers": GRIDS, "threads": 1, "device": "cpu", "seed": 5, "steps": None, "batch": 2}


def test_auto_round(monkeypatch, job, tmp_path):
    asked = {}

    class AutoRound:
        def __init__(self, model, tokenizer, **options):
            asked.update(options)
            self.model = model

        def quantize(self):
            for parameter in self.model.parameters():
                parameter.data.mul_(0.5)
            return self.model, None

    stand_in(monkeypatch, "auto_round", AutoRound=AutoRound)
    assert auto_round.run(job, tmp_path) == {}
    up, down = GRIDS
    assert (asked["bits"], asked["group_size"], asked["sym"]) == (4, 32, True)
    other = asked["layer_config"]
    assert up not in other
    assert other[down] == {"bits": 8, "group_size": -1, "sym": False}
    assert other["model.layers.1.mlp.up_proj"] == other["lm_head"] == {"bits": 16}
    assert (asked["nsamples"], asked["seqlen"], asked["batch_size"], asked["seed"]) == (3, 16, 2, 5)
    assert "iters" not in asked
    assert [row["input_ids"].tolist() for row in asked["dataset"]] == torch.arange(48).view(3, 1, 16).tolist()
    saved, float_model = load_file(tmp_path / "weights.safetensors"), load_file(tmp_path / "float/model.safetensors")
    assert saved.keys() == {f"{name}.weight" for name in GRIDS}
    assert all(torch.equal(weight, float_model[name] * 0.5) for name, weight in saved.items())


def test_llm_compressor(monkeypatch, job, tmp_path):
    asked = {}

    def oneshot(model, recipe, dataset, pipeline):
        asked.update(groups=recipe, rows=[batch["input_ids"] for batch in dataset], pipeline=pipeline)
        for scheme in recipe.values():
            for name in scheme.targets:
                layer = model.get_submodule(name)
                layer.weight_scale, layer.quantization_scheme = torch.tensor(2.0), scheme

    def fake_quantize(weight, scale, zero_point, args, g_idx):
        assert (zero_point, g_idx) == (None, None)
        return weight * scale + args.num_bits

    make = lambda **options: SimpleNamespace(**options)  # noqa: E731
    stand_in(monkeypatch, "llmcompressor", oneshot=oneshot)
    stand_in(monkeypatch, "llmcompressor.modifiers.gptq", GPTQModifier=lambda config_groups: config_groups)
    stand_in(monkeypatch, "compressed_tensors.quantization", QuantizationArgs=make, QuantizationScheme=make)
    forward = "compressed_tensors.quantization.lifecycle.forward"
    stand_in(monkeypatch, forward, fake_quantize=fake_quantize)
    assert llm_compressor.run(job, tmp_path) == {}
    first, second = asked["groups"].values()
    up, down = GRIDS
    assert (first.targets, first.weights.strategy, first.weights.group_size) == ([up], "group", 32)
    assert (second.targets, second.weights.strategy, second.weights.symmetric) == ([down], "channel", False)
    assert [rows.tolist() for rows in asked["rows"]] == [torch.arange(48).view(3, 16).tolist()]
    saved, float_model = load_file(tmp_path / "weights.safetensors"), load_file(tmp_path / "float/model.safetensors")
    assert torch.equal(saved[f"{down}.weight"], float_model[f"{down}.weight"] * 2 + 8)
