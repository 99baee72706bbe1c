import json

import numpy as np
import pytest

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Perplexity
from llmqat.pipeline.saved import (
    INPUTS,
    MEASURED,
    Record,
    check_measured,
    check_same_step,
    read_measurements,
    write_measurements,
)


def test_measurements_come_back_to_the_bit(tmp_path):
    assert read_measurements(tmp_path, "key") == {}
    rows = {
        "float": Perplexity(np.random.rand(5) / 3),
        "gptq": Perplexity(np.random.rand(2), 1 / 3, 2 / 3, (5, 7), {"q_proj": 1 / 7}),
        "rtn": Perplexity(np.random.rand(2), also={"c4": Perplexity(np.random.rand(3) / 7, 1 / 3, targets=(2, 3, 4))}),
    }
    write_measurements(tmp_path / "new", "key", rows)
    read_rows = read_measurements(tmp_path / "new", "key")
    assert read_rows.keys() == rows.keys()
    for row, expected in rows.items():
        same(read_rows[row], expected)
    same(read_rows["rtn"].also["c4"], rows["rtn"].also["c4"])


def same(read, expected):
    assert read.losses.tolist() == expected.losses.tolist()
    assert (read.kl_to_float, read.top1_agreement) == (expected.kl_to_float, expected.top1_agreement)
    assert (read.targets, read.layer_errors) == (expected.targets, expected.layer_errors)
    assert (read.also is None) == (expected.also is None)


def test_a_step_must_stay_as_large(monkeypatch):
    recipe = Recipe().with_values({"train.batch_size": 2, "train.accumulation": 3, "data.length": 10})
    check_same_step({"steps": 0, "sequences": 0}, recipe)
    check_same_step({"steps": 5, "sequences": 5 * 2 * 3}, recipe)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_same_step({"steps": 5, "sequences": 5 * 4 * 2 * 3}, recipe)
    message = (
        "a step took 6 sequences, and would take 24 now; the product of processes, --batch-size and --accumulation"
    )
    with pytest.raises(LlmqatError, match=message):
        check_same_step({"steps": 5, "sequences": 5 * 2 * 3}, recipe)


HASHES = {"test tokens": "a", "calibration tokens": "b", "float weights": "c"}
TRAINED = {**HASHES, "training tokens": "d", "validation tokens": "e"}


def test_another_device_may_go_on_and_says_so(tmp_path, capsys):
    Record(Recipe(), TRAINED, "cuda:0").write(tmp_path)
    again = Record(Recipe().with_values({"device": "cuda:1"}), TRAINED, "cuda:1")
    assert again.check(tmp_path)
    assert capsys.readouterr().err == ""
    assert Record(Recipe(), TRAINED, "cpu").check(tmp_path)
    assert "this run was on cuda:0, and goes on on cpu, where sums round otherwise" in capsys.readouterr().err
    assert again.key == Record(Recipe(), TRAINED).key


def test_a_record_is_of_one_run(tmp_path):
    record = Record(Recipe(), TRAINED)
    assert not record.check(tmp_path)
    record.write(tmp_path)
    assert record.check(tmp_path)
    moved = Record(Recipe().with_values({"output": "elsewhere", "train.batch_size": 1}), TRAINED)
    assert moved.check(tmp_path)
    assert moved.key == record.key
    for name in TRAINED:
        other = Record(Recipe(), {**TRAINED, name: "other"})
        assert (other.key == record.key) == (name in ("training tokens", "validation tokens"))
        with pytest.raises(LlmqatError, match=f"the {name} are not those that the run in .* began with; give it the"):
            other.check(tmp_path)
    with pytest.raises(LlmqatError, match=r"but quant\.bits is 3 now and was 4; give the same options"):
        Record(Recipe().with_values({"quant.bits": 3}), TRAINED).check(tmp_path)


def test_a_run_without_training_may_be_trained(tmp_path):
    Record(Recipe(), HASHES).write(tmp_path)
    trained = Record(Recipe(), TRAINED)
    assert trained.check(tmp_path)
    assert trained.key == Record(Recipe(), HASHES).key
    trained.write(tmp_path)
    again = Record(Recipe(), HASHES)
    assert again.check(tmp_path)
    assert again.hashes == TRAINED, "hashes of training tokens are not forgotten"


def damaged(text):
    """What may be read in the place of a sealed file."""
    values = json.loads(text)
    flipped = text.replace("0", "1", 1) if "0" in text else text.replace("a", "b", 1)
    unsealed = {key: value for key, value in values.items() if key != "sha256"}
    parts = ["", "{", text[: len(text) // 2], flipped, json.dumps(unsealed), "[]", "null", "[" * 100_000, "\x00"]
    return [*parts, json.dumps({**values, "sha256": None}), json.dumps({**values, "more": 1})]


def read_all(record, directory):
    """What a resume reads of sealed JSON."""
    record.check(directory)
    read_measurements(directory, record.key)


@pytest.mark.parametrize("name", [INPUTS, MEASURED])
def test_damage_is_seen(tmp_path, name):
    record = Record(Recipe(), HASHES)
    record.write(tmp_path)
    write_measurements(tmp_path, record.key, {"float": Perplexity(np.array([1.0, 2.0]))})
    for text in damaged((tmp_path / name).read_text()):
        (tmp_path / name).write_text(text)
        with pytest.raises(LlmqatError, match=rf"{name} is damaged, or was written by another .*; start again with"):
            read_all(record, tmp_path)
    (tmp_path / name).write_bytes(b"\xff\xfe{}")
    with pytest.raises(LlmqatError, match="is damaged"):
        read_all(record, tmp_path)


def test_measurements_belong_to_their_run(tmp_path):
    write_measurements(tmp_path, "one", {})
    with pytest.raises(LlmqatError, match="holds measurements of other inputs than those of this run; start again"):
        read_measurements(tmp_path, "other")


def test_a_record_of_another_format(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("llmqat.pipeline.saved.FORMAT", 1)  # whose states hold whole models
        Record(Recipe(), HASHES).write(tmp_path)
    with pytest.raises(LlmqatError, match="has format 1, and this llmqat reads 2; go on with the version that wrote"):
        Record(Recipe(), HASHES).check(tmp_path)


def test_what_cannot_be_measured_after_training(tmp_path):
    check_measured({"float": Perplexity(np.array([1.0]))}, ["float"], tmp_path)
    with pytest.raises(LlmqatError, match="lacks the row gptq, which cannot be measured after training; start again"):
        check_measured({}, ["gptq"], tmp_path)
