"""Every YAML recipe, run by the command it opens with, on a tiny random model of its family."""

import json
import shlex

import pytest

import llmqat
from llmqat.cli.recipes import bundled_recipes, bundled_scripts, command_of
from llmqat.config import from_yaml

RECIPES = bundled_recipes()
# Recipe -> model type of what it is for, where that is not a Llama.
FAMILY = {"qwen": "qwen2", "mistral": "mistral", "gemma": "gemma2", "phi": "phi3", "gpt2": "gpt2"}
WANTED = {"llama", "bert_classification", "mixed", "w4a8", "w8a8", "int3", "lora", "chat", *FAMILY}
MOST_LINES = 25


def header(path):
    """The comment that a recipe opens with."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    path = tmp_path_factory.mktemp("chat") / "talks.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"add {i}", "completion": str(i + 1)}) + "\n" for i in range(60)))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_of_a_recipe_runs(name, family_dir, text_file, talks, tmp_path, call, small_flags, quantize_flags):
    """Only model, data, and sizes of the run are replaced; the grid, the mode and the rest are the recipe's."""
    recipe, model_type, out = from_yaml(RECIPES[name]), FAMILY.get(name, "llama"), tmp_path / "out"
    program, *arguments = shlex.split(command_of(RECIPES[name]))
    assert program == "llmqat"
    assert arguments[arguments.index("--recipe") + 1] == name
    data = talks if recipe.data.rows == "chat" else text_file
    stand_ins = ["--model", family_dir(model_type), "--dataset", data, "--output", out]
    small = [*small_flags, "--max-steps", 2] if arguments[0] == "finetune" else quantize_flags
    small = [*small, "--length", 64, "--window", 64]
    assert call([*arguments, *stand_ins, *small]) == 0
    report = json.loads((out / "report.json").read_text())
    assert json.loads((out / "config.json").read_text())["model_type"] == model_type
    for section in ("quant", "init"):
        chosen = {key: value for key, value in recipe.to_dict()[section].items() if value is not None}
        chosen.pop("samples", None)  # fewer here
        assert {key: report["recipe"][section][key] for key in chosen} == chosen
    for key in ("mode", "lora_r", "loss", "accumulation"):
        assert getattr(recipe.train, key) in (None, report["recipe"]["train"][key])
    opened = "window" if model_type.startswith("gemma") else "stream"
    assert report["recipe"]["eval"]["bos"] == (recipe.eval.bos or opened)
    assert report["training"]["steps"] == (2 if arguments[0] == "finetune" else None)
    assert report["perplexity"]["packed"] > 0
    assert llmqat.verify(out).ok


def test_there_is_a_recipe_for_each():
    assert {*RECIPES, *bundled_scripts()} >= WANTED


@pytest.mark.parametrize("name", sorted(WANTED))
def test_a_recipe_is_short_and_says_what_to_expect(name):
    path = {**RECIPES, **bundled_scripts()}[name]
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    assert text.startswith(f"# {command_of(path)}\n")
    assert "Expect" in header(path)
    assert any(character.isdigit() for character in header(path).split("Expect", 1)[1])
