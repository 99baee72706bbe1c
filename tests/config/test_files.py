"""Whatever a recipe file holds, reading it ends soon, with a recipe or in one line."""

import os
import re

import pytest

from llmqat.config import Recipe, from_yaml
from llmqat.config.files import MOST_BYTES
from llmqat.errors import LlmqatError

BOMB = b"&a0 [x,x,x,x,x,x,x,x,x,x], " + b", ".join(
    b"&a%d [%s]" % (i, b",".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)
)
BAD = {
    "date": (b"seed: 2020-13-45\n", "seed must be a whole number, got '2020-13-45'"),
    "real date": (b"seed: 2020-01-02\n", "seed must be a whole number, got '2020-01-02'"),
    "latin-1": (b"model: \xe9\xff\n", "is not UTF-8 text"),
    "utf-16": ("model: x\n".encode("utf-16"), "is not UTF-8 text"),
    "int tag": (b"seed: !!int x\n", "is not YAML: cannot read 'x' as int"),
    "empty int tag": (b"seed: !!int ''\n", "is not YAML: cannot read '' as int"),
    "object tag": (b"seed: !!python/object/apply:os.system [ls]\n", "is not YAML: could not determine a constructor"),
    "set tag": (b"model: !!set {a, b}\n", "is not YAML: could not determine a constructor"),
    "binary tag": (b"model: !!binary aGVsbG8=\n", "is not YAML: could not determine a constructor"),
    "huge float": (b"train: {lr: 1" + b"0" * 400 + b"}\n", "train.lr must be a number, got a whole number of"),
    "huge int": (b"seed: 1" + b"0" * 30 + b"\n", "seed must be at most 9223372036854775807, got 1000"),
    "int beyond digits": (b"seed: " + b"9" * 5000 + b"\n", "is not YAML: cannot read '999"),
    "hexadecimal": (b"seed: 0x" + b"f" * 9000 + b"\n", "seed must be at most .* got a whole number of 36000 bits"),
    "large steps": (b"train: {max_steps: 99999999999}\n", "train.max_steps must be at most 2147483647, got"),
    "deep": (b"[" * 3000, "is not YAML: nested more than 20 deep"),
    "deep mapping": (b"{a: " * 3000, "is not YAML: nested more than 20 deep"),
    "bomb": (b"model: [" + BOMB + b"]\n", "is not YAML: aliases make it larger than 10000 values"),
    "chain": (
        b"a: [&a0 [x], " + b", ".join(b"&a%d [*a%d]" % (i, i - 1) for i in range(1, 3000)) + b"]\n",
        "is not YAML: aliases",
    ),
    "cycle": (b"model: &a [*a]\n", "is not YAML: aliases nest more than 20 deep"),
    "not a number": (b"train: {lr: .nan}\n", "train.lr must be at least 0, got nan"),
    "infinite": (b"train: {lr: .inf}\n", "train.lr must be a finite number, got inf"),
    "twice": (b"seed: 1\nseed: 2\n", "is not YAML: key 'seed' twice"),
    "twice in a section": (b"quant: {bits: 4, bits: 3}\n", "is not YAML: key 'bits' twice"),
    "list as key": (b"? [a]\n: 1\n", "is not YAML: .*unhashable key"),
    "number as key": (b"4: 1\n", "unknown key 4; known: model"),
    "two documents": (b"seed: 1\n---\nseed: 2\n", "is not YAML: expected a single document"),
    "control characters": (b'model: "a\\0b"\n', "model must not hold control characters"),
    "lone surrogate": (b'model: "\\ud800"\n', r"model must be UTF-8 text, got '\\ud800'"),
    "empty": (b"output: ''\n", "output must not be empty; leave it out for its default"),
    "long": (b"model: " + b"x" * 5000 + b"\n", "model must be at most 4096 characters long, got 5000"),
    "large": (b"#" * (MOST_BYTES + 1), f"has more than {MOST_BYTES} bytes, too many for a recipe"),
    "large value": (b"model: {" + b", ".join(b"k%d: 1" % i for i in range(2000)) + b"}\n", "model must be text, got {"),
    "pattern": (b"quant: {overrides: {'(': float}}\n", r"'\(' is no regular expression"),
    "repetition": (b"quant: {overrides: {'a{99999999999}': float}}\n", "is no regular expression"),
    "number as pattern": (b"quant: {overrides: {1: float}}\n", "a pattern must be text, got 1; put it in quotes"),
    "change": (b"quant: {overrides: {o_proj: [1]}}\n", r"override 'o_proj': write float, or any of .* got \[1\]"),
    "field": (b"quant: {overrides: {o_proj: {bits: [1]}}}\n", r"overrides\['o_proj'\].bits must be a whole number"),
    "static": (b"quant: {act_static: true}\n", "act_static is about int8 activations: set act_bits to 8"),
    "both names": (b"train: {length: 64}\ndata: {length: 32}\n", "train.length is now data.length, and both are given"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_short_line(tmp_path, name):
    data, message = BAD[name]
    path = tmp_path / "r.yaml"
    path.write_bytes(data)
    with pytest.raises(LlmqatError, match=message) as caught, pytest.warns() if name == "both names" else nothing():
        from_yaml(path)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 700
    assert "\n" not in str(caught.value)


def nothing():
    import contextlib

    return contextlib.nullcontext()


def test_aliases_stand_for_what_they_name(tmp_path):
    (tmp_path / "r.yaml").write_text("quant:\n  overrides:\n    o_proj$: &eight {bits: 8}\n    down_proj$: *eight\n")
    eight = {"bits": 8}
    assert from_yaml(tmp_path / "r.yaml").quant.overrides == {"o_proj$": eight, "down_proj$": eight}


def test_a_byte_order_mark_is_no_content(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert from_yaml(tmp_path / "r.yaml").seed == 3


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(LlmqatError, match=rf"recipe {re.escape(str(path))} is no file; give a YAML file, or"):
            from_yaml(path)
    with pytest.raises(LlmqatError, match=r"cannot read recipe .*: File name too long"):
        from_yaml(tmp_path / ("x" * 300))


def test_the_old_name_of_the_length_is_accepted_for_a_version(tmp_path):
    (tmp_path / "r.yaml").write_text("train:\n  length: 64\n  lr: 0.1\n")
    with pytest.warns(DeprecationWarning, match=r"train\.length is now data\.length; the old name goes with the next"):
        recipe = from_yaml(tmp_path / "r.yaml")
    assert (recipe.data.length, recipe.train.lr) == (64, 0.1)
    with pytest.warns(DeprecationWarning, match=r"train\.length is now data\.length"):
        assert Recipe().with_values({"train.length": 32}).data.length == 32
