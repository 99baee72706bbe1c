import json
from types import SimpleNamespace

import pytest
import torch

from llmqat.config import DataConfig, resolve
from llmqat.errors import LlmqatError
from llmqat.metrics.published import scored_windows
from llmqat.pipeline.inputs import calibration, eval_windows, other_texts, read, tokenized


def test_eval_scores_a_named_set_as_papers_do(papers_hub, model_dir, tokenizer, tmp_path, call, capsys):
    assert call(["eval", model_dir, "--dataset", "wikitext2", "--json", tmp_path / "e.json"]) == 0
    assert papers_hub["asked"] == ["wikitext2 test"]  # nothing else is downloaded
    captured = capsys.readouterr()
    assert "the model's context is 64 tokens: windows are cut to it; papers take 2048" in captured.err
    numbers = json.loads((tmp_path / "e.json").read_text())
    data = scored_windows("wikitext2", tokenizer, 64)
    assert (numbers["tokens"], numbers["sha256"], numbers["window"]) == (data.tokens, data.sha256, 64)
    assert numbers["protocol"] == data.protocol
    assert f"protocol         wikitext2 as in GPTQ, {len(data.ids)} windows of 64, BOS tokenizer" in captured.out


def test_what_is_asked_for_goes_before_the_protocol(papers_hub, tokenizer, capsys):
    data = eval_windows(DataConfig("c4"), tokenizer, 64, 16, 80, "none")
    assert torch.equal(data.ids, scored_windows("c4", tokenizer, 16, 80, "none").ids)
    assert data.ids.shape == (5, 16)
    assert not capsys.readouterr().err
    whole = eval_windows(DataConfig("c4-new"), tokenizer, None, None, None, None)
    assert whole.ids.shape[1] == 2048


def test_other_datasets_keep_their_defaults(text_file, tokenizer):
    data = eval_windows(DataConfig(str(text_file)), tokenizer, 64, None, 2000, None)
    assert (data.ids.shape[1], data.bos, data.name) == (512, "stream", None)


def test_bos_opens_whatever_trains_calibrates_or_is_scored(small_recipe, text_file, tokenizer, tmp_path):
    changes = {"eval.bos": "window", "init.method": "gptq", "data.length": 8, "eval.window": 8}
    recipe = resolve(small_recipe(tmp_path, {"data.dataset": str(text_file), **changes}), 1)
    corpus, planned = read(recipe.data, recipe.data.dataset), SimpleNamespace(quantized=[])
    inputs = tokenized(recipe, tokenizer, corpus, planned, train=True)
    rows = [inputs.training, inputs.validation.ids, inputs.test.ids, torch.cat(calibration(recipe, tokenizer))]
    assert all((ids[:, 0] == tokenizer.bos_token_id).all() for ids in rows)
    assert {ids.shape[1] for ids in rows} <= {recipe.data.length, recipe.eval.window}


def test_a_named_calibration_set_is_not_streamed(papers_hub):
    corpus = read(DataConfig("some/stream", streaming=True), "c4")
    assert len(corpus.test) == 1200


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_finetune_on_a_named_set(papers_hub, small_recipe, tmp_path, name):
    from llmqat.pipeline.run import run

    changes = {"data.dataset": name, "eval.tokens": 128, "eval.bos": "tokenizer", "eval.validation_tokens": 64}
    measured = run(small_recipe(tmp_path, {**changes, "train.batch_size": 2, "init.method": "rtn"}))
    report = json.loads((tmp_path / "report.json").read_text())
    data = measured.data
    assert (len(data.ids), data.name) == (4, f"{name} as in GPTQ")
    assert report["tokens"]["eval_sha256"] == data.sha256
    assert f"{name} as in GPTQ, 4 windows of 32, BOS tokenizer" in " ".join(
        (tmp_path / "README.md").read_text().split()
    )


def test_another_text_is_not_that_of_the_run(small_recipe, text_file, tmp_path, tokenizer):
    recipe = resolve(small_recipe(tmp_path, {"data.dataset": str(text_file), "eval.also": str(text_file)}), 1000)
    with pytest.raises(LlmqatError, match="is the dataset of the run, which is scored already; name another"):
        other_texts(recipe, tokenizer)
