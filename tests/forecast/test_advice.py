"""Which flags are named where a run does not fit, and that they are named before any work."""

import pytest
import torch

from llmqat.config import Recipe, resolve
from llmqat.forecast import words
from llmqat.forecast.advice import fitting, remedies
from llmqat.forecast.stages import Forecast, Stage

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
    assert remedies(recipe(**values)) == []


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
    assert "and no flag makes it fit: take a larger machine, or llmqat quantize --low-memory" in announced(10)


def test_a_mixture_of_experts_is_not_predicted(tiny_moe, tmp_path, announced):
    tiny_moe("qwen3_moe").save_pretrained(tmp_path / "moe")
    assert announced(100, model=str(tmp_path / "moe")) == ""


def test_a_small_model_begins_at_once(tiny_llama, announced, monkeypatch):
    monkeypatch.setattr(words, "LEAST_PARAMETERS", 10**9)
    assert announced(100) == ""
