import json
import runpy
import shutil
import sys

import llmqat
from llmqat import QuantScheme
from tests.eval.conftest import EVAL


def test_answers_of_both_models(model_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EVAL)
    source = shutil.copytree(model_dir, tmp_path / "float")
    tokenizer = llmqat.load_tokenizer(source)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(source)
    model = llmqat.load_float(source)
    llmqat.prepare(model, QuantScheme(8, 16))
    packed, output = llmqat.pack(model, tmp_path / "packed", tokenizer), tmp_path / "answers.json"
    told = (packed, "--model", source, "--output", output, "--tokens", 4)
    monkeypatch.setattr(sys, "argv", ["answers.py", *map(str, told)])
    runpy.run_path(str(EVAL / "answers.py"), run_name="__main__")
    found, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert list(found["answers"]) == ["float", "packed"]
    assert {len(said) for said in found["answers"].values()} == {20} == {len(found["questions"])}
    same = sum(map(str.__eq__, *found["answers"].values()))
    assert f"packed: {same} of 20 answers are word for word those of float" in printed
    assert len(set(found["answers"]["float"])) > 1
