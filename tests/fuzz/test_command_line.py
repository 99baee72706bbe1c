"""Command lines of any values, and directories of any content: success, or one line and exit code 1 or 2."""

import json
import shutil
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmqat.cli import main
from llmqat.cli.commands import COMMANDS as ALL_COMMANDS
from llmqat.cli.flags import recipe_from
from llmqat.cli.parser import build_parser
from llmqat.config import DataConfig, EvalConfig, InitConfig, QuantConfig, Recipe, TrainConfig
from llmqat.errors import LlmqatError
from llmqat.files import read_sealed_json
from llmqat.train.checkpoint import Checkpoints
from tests.fuzz.conftest import time_limit

SECTIONS = (Recipe, QuantConfig, InitConfig, TrainConfig, DataConfig, EvalConfig)
COMMANDS = ("finetune", "quantize", "inspect")
PARSER = build_parser(dict.fromkeys(ALL_COMMANDS, print))
FLAGS = [f.metadata["flag"] for section in SECTIONS for f in fields(section) if f.metadata.get("flag")]
FLAGS += ["--override", "--asym", "--overwrite", "--resume"]
WORDS = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", "-1", "9" * 5000, "nan", "inf", "auto", "x:bits=8", "(:float", ":", "a:b=c", "\udcff", "--bits", "1_0"]
    ),
)
LINES = st.lists(st.one_of(st.tuples(st.sampled_from(FLAGS), WORDS), st.tuples(st.sampled_from(FLAGS))), max_size=4)


@given(st.sampled_from(COMMANDS), LINES)
def test_values_of_flags(command, pairs):
    """Parsed to a recipe, or refused: nothing else, and nothing runs."""
    refusal, code = "", 0
    with time_limit():
        try:
            recipe_from(PARSER.parse_args([command, *(word for pair in pairs for word in pair)]))
        except LlmqatError as error:
            refusal = str(error)
        except SystemExit as stopped:
            code = stopped.code
    assert "\n" not in refusal
    assert len(refusal) < 1000
    assert code in (0, 2)


@pytest.fixture(scope="module")
def run_directory(finished, tmp_path_factory):
    """A finished run whose files may be damaged."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("fuzz") / "run"))


FILES = ("checkpoint/measured.json", "checkpoint/inputs.json", "checkpoint/checkpoint.pt", "recipe.yaml", "report.json")
READERS = {"report": ["report"], "verify": ["verify", "--no-logits"]}


def damage(whole: bytes, draw) -> bytes:
    """Bytes in the place of `whole`: flipped, cut, replaced, or others."""
    kind = draw(st.sampled_from(["flip", "cut", "replace", "other"]))
    if kind == "other":
        return draw(
            st.one_of(st.binary(max_size=60), st.sampled_from([b"{}", b"[]", b"null", b"[" * 50_000, b'{"a": 1}']))
        )
    at = draw(st.integers(0, len(whole) - 1))
    if kind == "cut":
        return whole[:at]
    changed = bytearray(whole)
    changed[at] ^= 1 << draw(st.integers(0, 7)) if kind == "flip" else 0
    if kind == "replace":
        changed[at : at + draw(st.integers(1, 40))] = draw(st.binary(max_size=40))
    return bytes(changed)


@given(st.data())
def test_damaged_checkpoints(run_directory, data):
    """What a resume reads is whole, or refused in one line."""
    name = data.draw(st.sampled_from([name for name in FILES if name.startswith("checkpoint/")]))
    whole = (run_directory / name).read_bytes()
    changed = damage(whole, data.draw)
    with tempfile.TemporaryDirectory() as folder, time_limit():
        path = Path(folder) / Path(name).name
        path.write_bytes(changed)
        run = json.loads((run_directory / "checkpoint/measured.json").read_text())["run"]
        refusal = ""
        try:
            if path.suffix == ".pt":
                Checkpoints(Path(folder), run).load()
                sound = changed == whole
            else:
                sound = read_sealed_json(path, "start again") == read_sealed_json(run_directory / name, "")
        except LlmqatError as error:
            refusal = str(error)
        assert sound if not refusal else "start again" in refusal


@given(st.data())
def test_damaged_directories(run_directory, data):
    """`report` and `verify` of a directory with one damaged file: exit code 0 or 1, and one line, never unexpected."""
    name = data.draw(st.sampled_from(["report.json", "details.json", "config.json", "fingerprint.json"]))
    command = READERS["verify" if name in ("config.json", "fingerprint.json") else "report"]
    path = run_directory / name
    whole = path.read_bytes()
    path.write_bytes(damage(whole, data.draw))
    try:
        with time_limit(), pytest.MonkeyPatch.context() as patch:
            lines = []
            patch.setattr("builtins.print", lambda *args, **kwargs: lines.append(" ".join(map(str, args))))
            code = main([command[0], str(run_directory), *command[1:]])
    finally:
        path.write_bytes(whole)
    assert code in (0, 1)
    assert not any(line.startswith("llmqat: unexpected") for line in lines), lines
