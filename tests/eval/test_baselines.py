import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "eval" / "baselines.py"
ROWS = [
    "float",
    "llmqat GPTQ",
    "llmqat LoRA, packed",
    "float + LoRA",
    "NF4",
    "NF4 + LoRA (QLoRA)",
    "NF4 + LoRA, merged into NF4",
    "LLM.int8",
]


def test_every_row_is_trained_and_measured_on_the_same_tokens(model_dir, text_file, tmp_path, monkeypatch, capsys):
    options = "--max-steps 8 --length 32 --group-size 32 --lora-r 8 --lr 1e-5 1e-2 --eval-tokens 512"
    output = tmp_path / "baselines.json"
    argv = ["baselines.py", "--model", model_dir, "--dataset", text_file, "--output", output, *options.split()]
    monkeypatch.setattr(sys, "argv", list(map(str, argv)))
    runpy.run_path(str(SCRIPT), run_name="__main__")
    report = json.loads(output.read_text())
    rows = report["rows"]
    printed = capsys.readouterr().out
    assert list(rows) == ROWS
    assert all(name in printed for name in ROWS)
    assert report["tokens"] == {"train": 8 * 4 * 32, "eval": 512}
    ppl = {name: row["perplexity"] for name, row in rows.items()}
    assert len(set(ppl.values())) == len(ROWS)
    for name, base in (
        ("float + LoRA", "float"),
        ("NF4 + LoRA (QLoRA)", "NF4"),
        ("llmqat LoRA, packed", "llmqat GPTQ"),
    ):
        assert ppl[name] < ppl[base]  # a random model learns these few words at once
    assert rows["NF4 + LoRA (QLoRA)"]["lr"] == 1e-2  # the better one on held-out text
    assert rows["float"]["kl_to_float"] == pytest.approx(0, abs=1e-6)
    assert ppl["NF4 + LoRA, merged into NF4"] < ppl["NF4"]  # merging costs, but is not broken
    assert rows["LLM.int8"]["kl_to_float"] < rows["NF4"]["kl_to_float"]
    assert rows["NF4 + LoRA (QLoRA)"]["bits"] > rows["NF4"]["bits"] + 1  # the adapter is stored, too
