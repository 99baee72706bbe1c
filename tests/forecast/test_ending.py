"""Predictions for the end of a run beside what a packed model takes that is verified and timed."""

from types import SimpleNamespace

import pytest
import torch

from llmqat.config import Recipe
from llmqat.forecast.cost import cost_of, scored_batch
from llmqat.forecast.ending import of_packed, packed_bytes, throughput, verification
from llmqat.forecast.stages import forecast
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import check_loaded, expected_in
from llmqat.formats.writer import save_packed
from llmqat.metrics.live_bytes import LiveBytes
from llmqat.metrics.throughput import throughput as measured_throughput
from llmqat.models.loading import load_empty
from llmqat.models.patcher import prepare
from llmqat.models.planning import checked_plan, resolve_for

LARGE_HEAD = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 6000}
LARGE_LAYERS = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 100}


@pytest.fixture(params=[LARGE_HEAD, LARGE_LAYERS], ids=["head", "layers"])
def packed(request, tiny, tmp_path):
    """A packed model, and what is known of it without weights."""
    model = tiny("llama", **request.param).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "float")
    empty, stored = load_empty(str(tmp_path / "float"))
    values = {"model": str(tmp_path / "float"), "quant.group_size": 32, "train.mode": "lora"}
    recipe = resolve_for(empty, Recipe().with_values({**values, "eval.prompt": 32, "eval.new_tokens": 4}))
    coverage = checked_plan(empty, recipe.scheme())
    prepare(model, recipe.scheme(), storage_dtype=torch.bfloat16)
    directory = save_packed(model, tmp_path / "packed")
    batch = cost_of(scored_batch, empty, recipe, coverage, stored)
    known = recipe, empty, coverage, stored
    return SimpleNamespace(directory=directory, known=known, batch=batch)


def tensors_of(model):
    return [tensor for tensor in (*model.parameters(), *model.buffers())]


def test_verification_takes_what_was_predicted(packed):
    _, empty, coverage, stored = packed.known
    model = load_packed(packed.directory, torch.float32)
    live = LiveBytes(tensors_of(model))
    assert live.current == pytest.approx(packed_bytes(empty, coverage, stored, 4), rel=0.01)
    cost = of_packed(*packed.known, packed.batch)
    head = 2 * empty.lm_head.weight.numel()
    assert cost.held - head == pytest.approx(live.current, rel=0.01)
    assert cost.peak - cost.held == packed.batch.peak - packed.batch.held
    expected = expected_in(packed.directory, None)
    with live.counting(), torch.no_grad():
        check_loaded(packed.directory, model, expected)
    assert verification(empty, coverage, cost).bytes - head == pytest.approx(live.peak, rel=0.15)


def test_throughput_takes_what_was_predicted(packed):
    recipe, empty, *_ = packed.known
    peaks = []
    for model in (type(empty).from_pretrained(recipe.model), load_packed(packed.directory)):
        live = LiveBytes(tensors_of(model))
        with live.counting():
            measured_throughput(model, 32, 4, 1)
        peaks.append(live.peak)
    assert throughput(*packed.known, packed.batch).bytes == pytest.approx(max(peaks), rel=0.15)


def test_stages_of_the_end(packed):
    recipe, *rest = packed.known
    names = [stage.name for stage in forecast(recipe, *rest).stages]
    assert names[-4:] == ["evaluation, trained", "evaluation, packed", "verification", "throughput"]
    for untimed in ({"eval.repeats": 0}, {"low_memory": True, "train.gradient_checkpointing": True}):
        recipe = resolve_for(rest[0], Recipe().with_values({"model": recipe.model, "quant.group_size": 32} | untimed))
        assert [stage.name for stage in forecast(recipe, *rest).stages][-1] == "verification"
