"""The README and every guide: their bash and python blocks run from top to bottom, offline, as a reader would run them.

A block under ``<!-- not run: why -->`` is left out, and so is one that names no language: output, or a drawing. Python
blocks of a page share their variables; a yaml block is the file that its first line names. ``llama`` and ``stdlib`` are
small stand-ins, and `SMALL` shortens each command.
"""

import re
import runpy
import shlex
import subprocess
import sys
from argparse import _SubParsersAction
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmqat.cli.commands import COMMANDS
from llmqat.cli.parser import build_parser
from llmqat.models.architectures import ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"^(?P<skip><!-- not run: [^\n]+ -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
MEASURE = ["--window", 64, "--eval-tokens", 512]
RUN = [*MEASURE, "--calibration-samples", 8, "--length", 64, "--repeats", 0]
TRAIN = [*RUN, "--validation-tokens", 256, "--max-steps", 2, "--eval-every", 1, "--save-every", 1]
# Added to a command of a guide; the last of two equal flags counts.
SMALL = {"finetune": TRAIN, "quantize": RUN, "eval": MEASURE, "generate": ["--max-new-tokens", 4]}
OTHER_TOOLS = {"--num_processes", "--machine_rank", "--write-support"}
STAND_INS = (('"llama"', '"./my-model"'), ('"stdlib"', '"my.txt"'))


def blocks_of(page):
    """Language, code and line of every block that is to run."""
    text = page.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if found["language"] in ("bash", "python", "yaml") and not found["skip"]:
            yield found["language"], found["code"], text[: found.start("code")].count("\n") + 1


@pytest.fixture
def desk(tmp_path, monkeypatch, model_dir):
    """Where a reader sits: my-model, my.txt and chats.jsonl in the current folder, and no network."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, model_input_names=["input_ids", "attention_mask"])
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": 258, "max_position_embeddings": 1024}
    config = LlamaConfig(**sizes, initializer_range=0.1)
    for name in ("my-model", "llama"):
        LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    lines = [f"def add_{i}(x):\n    return x + {i}\n" for i in range(3000)]
    (tmp_path / "my.txt").write_text("\n".join(lines))
    talks = [f'{{"prompt": "add {i}", "completion": "{i + 1}"}}\n' for i in range(60)]
    (tmp_path / "chats.jsonl").write_text("".join(talks))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    (tmp_path / "eval").symlink_to(ROOT / "eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = dict(ARCHITECTURES)
    yield tmp_path
    ARCHITECTURES.clear()
    ARCHITECTURES.update(before)


@pytest.fixture
def shell(call, desk, monkeypatch):
    """``shell(block, where)``: every command of a bash block; llmqat and scripts in this process, others in bash."""

    def run(block, where):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\w+", words[0]):
                monkeypatch.setenv(*words.pop(0).split("="))
            if words[:1] == ["llmqat"]:
                small = [*SMALL.get(words[1], []), *stand_in_data(words)]
                small += ["--block-steps", 2] if "blockwise" in words else []
                assert call([*words[1:], *small]) == 0, f"{where}: {line}"
            elif words[:1] == ["python"]:
                monkeypatch.setattr(sys, "argv", words[1:])
                monkeypatch.syspath_prepend(Path(words[1]).resolve().parent)  # as python does
                runpy.run_path(words[1], run_name="__main__")
            elif words:
                llmqat = f'llmqat() {{ {sys.executable} -m llmqat "$@"; }}'
                subprocess.run(["bash", "-c", f"{llmqat}\n{line}"], check=True, capture_output=True)

    return run


def stand_in_data(words):
    """The default dataset is large: another one for a command that names none."""
    takes = words[1] in ("finetune", "quantize", "eval") and not {"--dataset", "--resume"} & set(words)
    return ["--dataset", "my.txt"] if takes else []


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks_of(page))], ids=lambda page: page.stem)
def test_every_example_runs(page, shell, desk):
    namespace = {}
    for language, code, line in blocks_of(page):
        if language == "yaml":
            (desk / code.split("\n")[0].lstrip("# ")).write_text(code)
            continue
        if language == "bash":
            shell(code, f"{page.name}:{line}")
            continue
        for name, stand_in in STAND_INS:
            code = code.replace(name, stand_in)
        code = re.sub(r'("max_steps": |max_steps=)\d+', r"\g<1>2", code)
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), namespace)


def test_which_blocks_run(tmp_path):
    (tmp_path / "a.md").write_text(
        "x\n\n```python\n1 / 0\n```\n<!-- not run: no GPU -->\n```bash\nx\n```\n\n```\ny\n```\n"
        "```bash\nz\n```\n<!-- not run: no GPU -->\n```bash\nx\n```\n"
    )
    assert list(blocks_of(tmp_path / "a.md")) == [("python", "1 / 0\n", 4), ("bash", "z\n", 15)]


def test_every_page_is_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"docs/{page.name}" not in readme] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
    paths = re.findall(r"`((?:recipes|eval|docs|tests|llmqat)/[\w/.-]+)`", text)
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_flags_exist(page):
    """Those that the text names by themselves, and those of commands that are not run."""
    text = page.read_text(encoding="utf-8")
    (choices,) = (action for action in build_parser(COMMANDS)._actions if isinstance(action, _SubParsersAction))
    known = {flag for sub in choices.choices.values() for action in sub._actions for flag in action.option_strings}
    commands = [line for line in text.splitlines() if line.startswith("llmqat ")]
    named = [*re.findall(r"`(--[a-z][\w-]+)", text), *re.findall(r"(--[a-z][\w-]+)", "\n".join(commands))]
    assert set(named) - known - OTHER_TOOLS == set()
