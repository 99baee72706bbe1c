"""Conversations through the command line: from rows to a packed file whose answers are measured."""

import json
import re

import pytest
from transformers import AutoTokenizer

from llmqat.data.template import PLAIN_TEMPLATE
from llmqat.formats.verify import verify

FLAGS = "--init rtn --length 64 --window 64 --max-steps 4 --batch-size 4 --eval-every 2 --repeats 0"


@pytest.fixture(scope="module")
def talks(tmp_path_factory):
    """60 short instructions with answers, one row without an answer and one line that is no JSON."""
    rows = [{"instruction": f"add {i}", "input": "", "output": str(i + 1)} for i in range(60)]
    path = tmp_path_factory.mktemp("chat") / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "output": ""}]) + "{half\n")
    return path


@pytest.mark.parametrize("loss", ["kd", "ce"])
def test_finetune_on_conversations(model_dir, talks, tmp_path, call, capsys, loss):
    argv = ["finetune", "--model", model_dir, "--dataset", talks, "--output", tmp_path / "out", *FLAGS.split()]
    assert call([*argv, "--init", "gptq", "--calibration-samples", "8", "--loss", loss]) == 0
    captured = capsys.readouterr()
    assert "2 of 62 rows left out; the first one, sums.jsonl line 61: the answer is empty" in captured.err
    assert "60 conversations (instruction, input, output); only answers count" in captured.err
    assert "the tokenizer has no chat template: using a plain one" in captured.err
    assert re.search(r"3 conversations, \d+ answer tokens scored", captured.out.replace("\n", " "))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["perplexity"]["packed"] == pytest.approx(report["perplexity"]["qat"], rel=1e-6)
    assert report["recipe"]["data"]["rows"] == "auto"
    assert 4 * 4 * 30 < report["tokens"]["train"] < 4 * 4 * 64  # padding is not counted
    assert verify(tmp_path / "out").ok
    # Whoever serves the model gets the template it was trained with.
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == PLAIN_TEMPLATE
    assert call(["eval", tmp_path / "out", "--dataset", talks, "--window", "64", "--json", tmp_path / "e.json"]) == 0
    numbers = json.loads((tmp_path / "e.json").read_text())
    assert numbers["perplexity"] == pytest.approx(report["perplexity"]["packed"], rel=1e-6)
    assert (numbers["sha256"], numbers["bos"]) == (report["tokens"]["eval_sha256"], "template")
    assert "scored           answers of conversations" in capsys.readouterr().out


def test_generate_answers_a_question(model_dir, call, capsys):
    options = ["--prompt", "add 3", "--max-new-tokens", "4"]
    assert call(["generate", model_dir, *options]) == 0
    assert capsys.readouterr().out.startswith("add 3")
    assert call(["generate", model_dir, *options, "--chat"]) == 0
    captured = capsys.readouterr()
    assert "add 3" not in captured.out
    assert "using a plain one" in captured.err


def test_resumed_measurements_keep_their_weights(model_dir, talks, tmp_path, call):
    argv = ["finetune", "--model", model_dir, "--dataset", talks, "--output", tmp_path, *FLAGS.split()]
    assert call(argv) == 0
    before = json.loads((tmp_path / "report.json").read_text())["perplexity"]
    assert call(["finetune", "--output", tmp_path, "--resume"]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["perplexity"] == before


def test_the_other_readings_of_the_same_rows(model_dir, talks, tmp_path, call, capsys):
    argv = ["quantize", "--model", model_dir, "--dataset", talks, "--output", tmp_path / "out", *FLAGS.split()[:6]]
    argv = [*argv, "--repeats", "0"]
    assert call([*argv, "--rows", "text", "--text-field", "instruction", "--window", "16", "--length", "16"]) == 0
    assert "windows of 16 without overlap" in capsys.readouterr().out.replace("\n", " ")
    assert call([*argv, "--overwrite", "--max-rows", "9"]) == 0
    assert "9 conversations" in capsys.readouterr().err


BAD = {
    "masked": (
        ["--length", "24", "--window", "24"],
        r"no answer token of the .*sums\.jsonl evaluation conversations is ",
    ),
    "text": (
        ["--rows", "text"],
        r"sums\.jsonl has no column 'text'; choose one of instruction, input, output by --text",
    ),
    "streaming": (["--streaming"], r"--streaming is for datasets of the Hub; .*sums\.jsonl is local"),
    "rows": (["--rows", "speech"], r"argument --rows: invalid choice: 'speech'"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_name_the_file_and_the_remedy(model_dir, talks, tmp_path, call, capsys, name):
    flags, message = BAD[name]
    argv = ["finetune", "--model", model_dir, "--dataset", talks, "--output", tmp_path / "out", *FLAGS.split(), *flags]
    assert call(argv) in (1, 2)
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw8bit"])
def test_optimizers_by_flag(model_dir, talks, tmp_path, call, optimizer):
    argv = ["finetune", "--model", model_dir, "--dataset", talks, "--output", tmp_path, *FLAGS.split()]
    assert call([*argv, "--optimizer", optimizer]) == 0
    assert verify(tmp_path).ok
