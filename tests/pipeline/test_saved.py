import numpy as np
import pytest

from llmqat.config import Recipe, to_yaml
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Perplexity
from llmqat.pipeline.saved import check_same_recipe, check_same_step, read_measurements, write_measurements


def test_measurements_come_back_to_the_bit(tmp_path):
    assert read_measurements(tmp_path) == ({}, {})
    rows = {
        "float": Perplexity(np.random.rand(5) / 3),
        "gptq": Perplexity(np.random.rand(2), 1 / 3, 2 / 3, (5, 7), {"q_proj": 1 / 7}),
    }
    errors = {"block 0 q_proj": (1 / 3, 1 / 7), "block 0 expert": (1 / 3, None)}
    write_measurements(tmp_path / "new", rows, errors)
    read_rows, read_errors = read_measurements(tmp_path / "new")
    assert read_errors == errors
    assert read_rows.keys() == rows.keys()
    for row, expected in rows.items():
        read = read_rows[row]
        assert read.losses.tolist() == expected.losses.tolist()
        assert (read.kl_to_float, read.top1_agreement) == (expected.kl_to_float, expected.top1_agreement)
        assert (read.targets, read.layer_errors) == (expected.targets, expected.layer_errors)


def test_the_recipe_must_be_the_same(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(Recipe()))
    check_same_recipe(path, Recipe().with_values({"output": "elsewhere", "train.batch_size": 2}))
    with pytest.raises(
        LlmqatError, match=r"--resume continues the recipe in .*, but seed is 1 now and was 0; give the"
    ):
        check_same_recipe(path, Recipe().with_values({"seed": 1}))


def test_a_step_must_stay_as_large(monkeypatch):
    recipe = Recipe().with_values({"train.batch_size": 2, "train.accumulation": 3, "train.length": 10})
    check_same_step({"steps": 0, "sequences": 0}, recipe)
    check_same_step({"steps": 5, "sequences": 5 * 2 * 3}, recipe)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_same_step({"steps": 5, "sequences": 5 * 4 * 2 * 3}, recipe)
    message = (
        "a step took 6 sequences, and would take 24 now; the product of processes, --batch-size and --accumulation"
    )
    with pytest.raises(LlmqatError, match=message):
        check_same_step({"steps": 5, "sequences": 5 * 2 * 3}, recipe)
