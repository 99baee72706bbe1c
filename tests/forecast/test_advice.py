"""Which flags are named where a run does not fit, and that they are named before any work."""

import pytest
import torch

from llmqat.config import Recipe, resolve
from llmqat.forecast import stages, words
from llmqat.forecast.advice import fitting, remedies
from llmqat.forecast.cost import Stage
from llmqat.forecast.stages import Forecast
from llmqat.models.loading import load_empty
from llmqat.models.planning import checked_plan, resolve_for

CPU = torch.device("cpu")


def recipe(**values):
    return resolve(Recipe().with_values(values), 10**8)


def predict(recipe):
    """Training takes a byte for each sequence, five times as many without checkpointing, and 40 for full weights."""
    train = recipe.train
    activations = train.batch_size * (1 if train.gradient_checkpointing else 5)
    peak = activations + (40 if train.mode == "full" and train.optimizer == "adamw" else 20)
    stages = [Stage("training", 8e12, torch.bfloat16, peak), Stage("GPTQ", 1e12, torch.float32, 22)]
    return Forecast(tuple(stage for stage in stages if stage.name != "GPTQ" or recipe.init.method == "gptq"))


@pytest.mark.parametrize(
    ("available", "flags"),
    [
        (60, ()),
        (44, ("--gradient-checkpointing",)),
        (41, ("--gradient-checkpointing", "--batch-size 1 --accumulation 8")),
        (22, ("--gradient-checkpointing", "--batch-size 1 --accumulation 8", "--optimizer adamw8bit")),
    ],
)
def test_the_first_flags_that_make_it_fit(available, flags):
    asked = recipe(**{"train.batch_size": 4, "train.accumulation": 2})
    fit = fitting(asked, predict(asked), predict, available)
    assert fit.flags == flags
    assert fit.forecast.worst.bytes <= available


def test_nothing_makes_it_fit():
    assert fitting(recipe(), predict(recipe()), predict, 10) is None


def test_a_flag_that_is_set_is_not_named():
    values = {"train.gradient_checkpointing": True, "train.batch_size": 1, "train.mode": "lora", "init.method": "rtn"}
    assert [remedy.flags for remedy in remedies(recipe(**values))] == ["--low-memory", "--lr-scale 0"]
    assert [remedy.flags for remedy in remedies(recipe(**values, low_memory=True))] == ["--lr-scale 0"]
    values["train.lr_scale"] = 0.0
    assert remedies(recipe(**values, low_memory=True)) == []
    assert remedies(recipe(**values, **{"quant.average_bits": 4.5})) == []  # which low memory cannot measure


def test_low_memory_is_named_before_another_start():
    """It changes no result, and is slow; full weights become adapters first."""

    def predict_low(recipe):
        return Forecast(tuple(s._replace(bytes=s.bytes - 15 * recipe.low_memory) for s in predict(recipe).stages))

    fit = fitting(recipe(), predict(recipe()), predict_low, 10)
    assert fit.flags[-1] == "--low-memory"
    assert "--init rtn" not in fit.flags


def test_seconds_of_a_stage():
    speeds = {torch.float32: 1e12, torch.bfloat16: 4e12}
    training, gptq = predict(recipe()).seconds(speeds.__getitem__)
    assert training > gptq > 1


@pytest.fixture
def announced(tiny_llama, tmp_path, monkeypatch, capsys):
    """``announced(available, **recipe)``: what is said before a run on a machine with so many GB."""
    monkeypatch.setattr(words, "LEAST_PARAMETERS", 1)
    monkeypatch.setattr(words, "flops_per_second", lambda device, dtype: 1e12)
    tiny_llama().save_pretrained(tmp_path)

    def announced(available, **values):
        monkeypatch.setattr(words, "available_memory", lambda device: available * 1e9)
        capsys.readouterr()
        words.announce(Recipe().with_values({"model": str(tmp_path), "quant.group_size": 16} | values), CPU, train=True)
        return capsys.readouterr().err

    return announced


def predicted(recipe, **_):
    return Forecast(tuple(stage._replace(bytes=stage.bytes * 1e9) for stage in predict(recipe).stages))


def test_time_and_memory_are_said_first(announced, monkeypatch):
    monkeypatch.setattr(words, "forecast", predicted)
    assert announced(100) == "this run takes about 26 s and 60.0 GB of memory, in training, on cpu\n"


def test_the_flag_is_named_where_memory_is_short(announced, monkeypatch):
    monkeypatch.setattr(words, "forecast", predicted)
    assert "there are 44.0 GB: add --gradient-checkpointing, which takes 44.0 GB" in announced(44)
    assert "and no flag makes it fit: take a larger machine, or a smaller model" in announced(10)


def test_experts_in_some_blocks_are_not_predicted(tiny_moe, tmp_path, announced):
    tiny_moe("qwen3_moe").save_pretrained(tmp_path / "moe")
    assert announced(100, model=str(tmp_path / "moe")) == ""
    assert stages.is_predictable(tiny_moe("qwen3_moe", mlp_only_layers=[]))
    assert not stages.is_predictable(tiny_moe("gpt_oss"))


def test_a_small_model_begins_at_once(tiny_llama, announced, monkeypatch):
    monkeypatch.setattr(words, "LEAST_PARAMETERS", 10**9)
    assert announced(100) == ""


def test_blocks_left_in_files_take_no_memory(tiny_llama, tmp_path):
    """All but one of four, with a byte of each weight for what GPTQ changed; and nothing in an ordinary run."""
    tiny_llama(num_hidden_layers=4).to(torch.bfloat16).save_pretrained(tmp_path)
    model, stored = load_empty(str(tmp_path))
    values = {
        "model": str(tmp_path),
        "quant.group_size": 16,
        "train.mode": "lora",
        "train.gradient_checkpointing": True,
    }
    ordinary, low = (resolve_for(model, Recipe().with_values({**values, "low_memory": on})) for on in (False, True))
    coverage = checked_plan(model, ordinary.scheme())
    before, after = (stages.forecast(recipe, model, coverage, stored) for recipe in (ordinary, low))
    # But for loading, and for the end of a run, where what was trained is in files whoever ordered it.
    stages_of_both = zip(before.stages[1:-3], after.stages[:-2], strict=True)
    saved = {round(a.bytes - b.bytes) for a, b in stages_of_both}
    assert saved == {3 * 3 * sum(p.numel() for p in model.model.layers[0].parameters() if p.ndim == 2)}
