"""Predictions of memory and operations beside what real steps and real batches take."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from llmqat.config import Recipe
from llmqat.forecast.cost import cost_of, scored_batch, training_step
from llmqat.kernels.training import SWITCH
from llmqat.metrics.live_bytes import LiveBytes
from llmqat.models.float_view import FloatView, copy_of_float
from llmqat.models.loading import load_empty
from llmqat.models.output_head import OutputHead
from llmqat.models.patcher import prepare
from llmqat.models.planning import checked_plan, resolve_for
from llmqat.models.widening import compute_in_float32
from llmqat.train.loop import Trainer, TrainingData
from llmqat.train.modes import add_lora, select_trainable

LLAMA = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": 1000, "num_hidden_layers": 5}
GPT2 = {"n_embd": 64, "n_layer": 4, "n_positions": 128, "vocab_size": 3000}
GEMMA3 = {"num_hidden_layers": 5, "layer_types": ["sliding_attention", *["full_attention"] * 4]}
CASES = [
    ("llama", LLAMA, {}),
    ("llama", LLAMA | {"num_key_value_heads": 1}, {"train.mode": "full", "stored": "bfloat16"}),
    ("llama", LLAMA, {"train.gradient_checkpointing": True, "stored": "bfloat16"}),
    ("llama", LLAMA | {"vocab_size": 20_000}, {"train.loss": "ce", "train.precision": "fp32"}),
    ("gemma3_text", GEMMA3, {"train.mode": "scales", "stored": "bfloat16"}),
    ("gpt2", GPT2, {"train.mode": "full", "train.loss": "ce"}),
    ("mixtral", {"num_hidden_layers": 1, "num_local_experts": 4}, {"quant.kv_bits": 8, "quant.act_bits": 8}),
]


@pytest.fixture(autouse=True)
def no_kernels_of_training(monkeypatch):
    """What is counted is operators of torch, of which compiled kernels take the place, with less memory."""
    monkeypatch.setenv(SWITCH, "torch")


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]} {' '.join(map(str, case[2].values()))}".strip())
def run(request, tiny, tiny_moe, tmp_path):
    """A recipe for a small model, the model, what is known of it without weights."""
    model_type, sizes, values = request.param
    make = tiny_moe if model_type == "mixtral" else tiny
    model = make(model_type, **sizes).to(getattr(torch, values.get("stored", "float32")))
    model.save_pretrained(tmp_path)
    small = {"quant.group_size": 32, "train.mode": "lora", "train.batch_size": 3, "data.length": 48, "eval.window": 64}
    empty, stored = load_empty(str(tmp_path))
    values = {name: value for name, value in values.items() if name != "stored"}
    recipe = resolve_for(empty, Recipe().with_values({"model": str(tmp_path), **small, "init.method": "rtn"} | values))
    coverage = checked_plan(empty, recipe.scheme())
    return SimpleNamespace(
        recipe=recipe, model=model, stored=stored, cost_of=lambda work: cost_of(work, empty, recipe, coverage, stored)
    )


def prepared(run):
    prepare(run.model.requires_grad_(False), run.recipe.scheme(), kv_bits=run.recipe.quant.kv_bits)
    compute_in_float32(run.model, run.stored)
    reference = copy_of_float(run.model) if run.recipe.train.mode == "full" else None
    model = add_lora(run.model, run.recipe.train.lora_r) if run.recipe.train.mode == "lora" else run.model
    select_trainable(model, run.recipe.train.mode, run.recipe.train.lr_scale > 0)
    return model, reference or FloatView(model)


def tensors_of(*models):
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def test_work_takes_what_was_predicted(run):
    predicted = {work: run.cost_of(work) for work in (training_step, scored_batch)}
    model, reference = prepared(run)
    for work, measured in ((scored_batch, scoring(model, reference)), (training_step, training(model, reference, run))):
        assert predicted[work].peak == pytest.approx(measured.peak, rel=0.15)
        assert predicted[work].flops == pytest.approx(measured.flops, rel=0.1)


def training(model, reference, run):
    """A step of the trainer, counted."""
    config, shape = run.recipe.train, (run.recipe.train.batch_size, run.recipe.data.length)
    ids = torch.randint(0, 100, shape)
    trainer = Trainer(model.train(), TrainingData(ids, ids), config, reference if config.loss == "kd" else None)
    trainer.step(itertools.repeat(ids))  # makes the optimizer's states
    states = [value for state in trainer.optimizer.state.values() for value in state.values()]
    live = LiveBytes([*tensors_of(model, reference.model), *states])
    with live.counting():
        trainer.step(itertools.repeat(ids))
    return live


@torch.no_grad()
def scoring(model, reference):
    """A batch of an evaluation, counted."""
    head, ids = OutputHead(model.eval()), torch.randint(0, 100, (64, 64))
    head.below(model, input_ids=ids[:1, :4], use_cache=False)
    live = LiveBytes(tensors_of(model, reference.model))
    with live.counting():
        below = head.below(model, input_ids=ids, use_cache=False)
        hidden = below.hidden.flatten(0, 1)
        for chunk in below.chunks(len(hidden)):
            below.logits(hidden[chunk])
    return live
