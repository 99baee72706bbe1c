"""A model with experts through the command line, as a user would."""

import json

import pytest
import torch


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def moe_dir(request, tiny_moe, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    tiny_moe(request.param, torch.bfloat16, vocab_size=258).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_inspect_lists_experts_once(moe_dir, call, capsys):
    assert call(["inspect", "--model", moe_dir, "--group-size", "16"]) == 0
    out = capsys.readouterr().out
    assert out.count("model.layers.0.mlp.experts.*.up_proj x 6") == 1
    assert "model family known: GPTQ and SmoothQuant apply; 6 experts in each of " in out


def test_override_of_some_experts_is_a_clean_error(moe_dir, call, capsys):
    assert call(["inspect", "--model", moe_dir, "--override", "experts.2:bits=8"]) == 1
    assert "overrides give experts several schemes" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_finetune_and_verify(moe_dir, mode, call, small_flags, text_file, tmp_path, capsys):
    """256 calibration tokens: the output and the report name the experts for which they were too few."""
    run = ["finetune", "--model", moe_dir, "--dataset", text_file, "--output", tmp_path, "--train", mode]
    assert call([*run, "--group-size", "16", "--smooth", "auto", *small_flags]) == 0
    said = capsys.readouterr().err
    assert "layers saw fewer than 2 calibration tokens for each of their inputs" in said
    assert "  mlp.experts.*.up_proj: output error" in said
    report = json.loads((tmp_path / "report.json").read_text())
    kept = report["coverage"]["kept_round_to_nearest"]
    assert kept
    assert all(".experts." in layer for layer in kept)
    assert report["verify"]["codes_equal"]
    assert report["perplexity"]["packed"] == pytest.approx(report["perplexity"]["qat"], rel=1e-5)
    assert call(["verify", tmp_path]) == 0
    assert call(["generate", tmp_path, "--prompt", "def x", "--max-new-tokens", "3"]) == 0
