"""The end of a run, on a device that counts the bytes it holds: proving takes no more memory than training did."""

import copy
import errno
import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.formats import decoding
from llmqat.mapped import Disk, is_mapped
from llmqat.metrics.live_bytes import LiveBytes
from llmqat.pipeline import proof
from llmqat.pipeline import speed as speed_module
from llmqat.pipeline.run import Run, run
from tests.conftest import TINY

SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32, "vocab_size": 300}
SHORT = {
    "train.max_steps": 1,
    "train.batch_size": 1,
    "train.gradient_checkpointing": True,
    "data.length": 16,
    "init.method": "rtn",
    "eval.window": 16,
    "eval.tokens": 16,
    "eval.validation_tokens": 16,
    "eval.repeats": 1,
    "eval.prompt": 4,
    "eval.new_tokens": 2,
    "quant.group_size": 16,
}


@pytest.fixture
def peaks(pretended, monkeypatch):
    """Bytes on the device at their worst, by stage, and those when a model is timed."""
    live, found = LiveBytes(), {}
    place = pretended.place

    def counted(tensor, here):
        place(tensor, here)
        if here:
            live.hold(tensor)

    def staged(name):
        stage = getattr(Run, name)

        def work(self):
            live.peak = live.current
            stage(self)
            found[name] = live.peak

        monkeypatch.setattr(Run, name, work)

    def timed(model, *arguments):
        held = {t.data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
        found.setdefault("beside what is timed", []).append(live.current - sum(held.values()))
        return throughput(model, *arguments)

    throughput = speed_module.throughput
    monkeypatch.setattr(pretended, "place", counted)
    monkeypatch.setattr(speed_module, "throughput", timed)
    for name in ("train_model", "pack_model", "measure_packed"):
        staged(name)
    return found


def test_the_end_takes_no_more_than_training(peaks, small_recipe, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "NEW_TOKENS", 2)
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(**TINY | SIZES), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run(small_recipe(tmp_path / "out", {**SHORT, "model": str(tmp_path / "model"), "train.mode": "lora"}))
    assert max(peaks["pack_model"], peaks["measure_packed"]) < 0.65 * peaks["train_model"]
    assert peaks["beside what is timed"] == [0, 0]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verify"]["codes_equal"]


def test_matrices_are_put_aside(tiny_llama, tmp_path):
    """Those of both models, one that they share once; but what stays, and vectors. They compute what they did."""
    model, ids = tiny_llama(tie_word_embeddings=False), torch.arange(8)[None]
    other = copy.deepcopy(model, {id(p): torch.nn.Parameter(p.data) for p in model.model.parameters()})
    expected = model(ids).logits
    proof.put_aside((model, other), [other.lm_head], tmp_path)
    for both in zip(model.named_parameters(), other.parameters(), strict=True):
        (name, own), theirs = both
        assert is_mapped(own) == (own.ndim > 1)
        assert is_mapped(theirs) == (own.ndim > 1 and name != "lm_head.weight")
        assert (own.data_ptr() == theirs.data_ptr()) == (name != "lm_head.weight")
    assert torch.equal(model(ids).logits, expected)
    assert torch.equal(other(ids).logits, expected)


def test_without_room_on_the_disk_models_stay_in_memory(tiny_llama, tmp_path, monkeypatch, capsys):
    model, ids = tiny_llama(), torch.arange(8)[None]
    expected = model(ids).logits

    def full(self, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Disk, "_room_for", full)
    proof.put_aside((model,), [], tmp_path)
    assert not any(map(is_mapped, model.parameters()))
    assert "stays in memory" in capsys.readouterr().err
    assert torch.equal(model(ids).logits, expected)
