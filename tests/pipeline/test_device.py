"""Whole runs on a device that is not the CPU: nothing is left behind, and nothing is made elsewhere."""

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats import decoding
from llmqat.formats.reader import load_packed
from llmqat.pipeline import run as run_module
from llmqat.pipeline.run import run
from tests.conftest import TINY
from tests.pretended_device import PRETENDED

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "head_dim": 8,
    "vocab_size": 258,
}
SHORT = {
    "train.max_steps": 1,
    "train.batch_size": 2,
    "init.samples": 2,
    "eval.tokens": 64,
    "eval.validation_tokens": 64,
    "quant.group_size": 16,
}


@pytest.fixture(scope="module")
def small_model(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("models") / "small"
    torch.manual_seed(0)
    LlamaForCausalLM._from_config(LlamaConfig(**TINY | SMALL), dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def go(small_recipe, small_model, tmp_path, monkeypatch):
    """``go(name, changes)``: run a recipe to the end; its directory and report."""
    monkeypatch.setattr(decoding, "NEW_TOKENS", 2)

    def make(name, changes, **kwargs):
        directory = tmp_path / name
        run(small_recipe(directory, {**SHORT, "model": str(small_model), **changes}), **kwargs)
        report = json.loads((directory / "report.json").read_text())
        assert report["verify"]["codes_equal"] is report["verify"]["scales_equal"] is True
        return directory, report

    return make


def test_lora_on_a_device(pretended, go):
    _, report = go("out", {"train.mode": "lora", "eval.repeats": 1, "eval.prompt": 4, "eval.new_tokens": 2})
    assert report["device"] == str(PRETENDED)
    assert (report["recipe"]["device"], report["training"]["peak_device_memory_bytes"]) == ("auto", 0)
    assert report["throughput"]["kernel"] == "reference"
    assert report["perplexity"]["packed"] == pytest.approx(report["perplexity"]["qat"], rel=1e-5)


def test_full_on_a_device(pretended, go, call, capsys):
    changes = {"train.mode": "full", "init.method": "rtn", "init.smooth": 0.5, "quant.act_bits": 8, "quant.kv_bits": 8}
    directory, report = go("out", changes)
    assert report["device"] == str(PRETENDED)
    assert call(["verify", directory]) == 0
    assert call(["generate", directory, "--prompt", "x", "--max-new-tokens", 2]) == 0
    assert load_packed(directory, device=PRETENDED).device == PRETENDED


def test_low_memory_on_a_device(pretended, go):
    """One block after the other comes to the device; the bytes are those of a model that is there as a whole."""
    changes = {"train.mode": "lora", "quant.lm_head_bits": 4}
    (plain, _), (streamed, report) = go("plain", changes), go("streamed", {**changes, "low_memory": True})
    assert report["device"] == str(PRETENDED)
    assert (plain / "model.safetensors").read_bytes() == (streamed / "model.safetensors").read_bytes()


@pytest.mark.parametrize("command", ["finetune", "quantize", "eval", "verify", "generate"])
def test_a_device_that_is_not_there(call, command, tmp_path, capsys):
    """Said before anything is loaded: there is no such model, either."""
    model = ["--model", "no/such-model", "--output", tmp_path] if command in ("finetune", "quantize") else [tmp_path]
    prompt = ["--prompt", "x"] if command == "generate" else []
    assert call([command, *model, *prompt, "--device", "cuda:7"]) == 1
    assert "no device 'cuda:7'; torch sees cpu: give one of them, or auto" in capsys.readouterr().err


def test_static_activations_need_float64(small_recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module, "find_device", lambda _: torch.device("mps"))
    with pytest.raises(
        LlmqatError, match="observed in float64, which mps does not have; leave --act-static out, or add"
    ):
        run(small_recipe(tmp_path / "out", {"quant.act_bits": 8, "quant.act_static": True}))
