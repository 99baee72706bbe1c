"""The first page stays one that is read: short, and clear on what this is."""

from pathlib import Path

import llmqat
from llmqat.cli.commands import COMMANDS
from llmqat.cli.parser import build_parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_LINES = 130


def test_the_readme_is_short():
    assert len(README.splitlines()) <= MOST_LINES


def test_it_is_said_everywhere_what_this_is():
    pitch = llmqat.__doc__.rstrip(".")
    assert pitch.startswith("Quantization-aware training")
    assert README.split("\n\n")[1] == f"**{pitch}.**"
    assert f'description = "{pitch}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert pitch in " ".join(build_parser(COMMANDS).format_help().split())


def test_the_command_of_the_readme_is_the_demo():
    assert "\nllmqat finetune --model llama --bits 4\n" in README
    assert "/bin/llmqat finetune --model llama --bits 4 " in (ROOT / "Makefile").read_text(encoding="utf-8")
