import json
import re

import pytest

from llmqat.errors import LlmqatError
from llmqat.report import schema

PLAIN = {"a": [1, 2.5, "x", None, True, {"b": []}]}


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (schema.number, "1", "x must be a number, got '1'"),
        (schema.number, True, "x must be a number, got True"),
        (schema.number, float("nan"), "x must be a number, got nan"),
        (schema.number, float("inf"), "x must be a number, got inf"),
        (schema.number, 10**400, "x must be a number, got 1000"),
        (schema.positive, 0, "x must be above 0, got 0"),
        (schema.count, -1, "x must be a whole number of at least 0, got -1"),
        (schema.count, 1.0, "x must be a whole number of at least 0, got 1.0"),
        (schema.integer, "1", "x must be a whole number, got '1'"),
        (schema.flag, 1, "x must be true or false, got 1"),
        (schema.text, 1, "x must be text, got 1"),
        (schema.text, "\ud800", "x must be text in UTF-8, got"),
        (schema.choice(1), True, "x must be one of 1, got True"),
        (schema.choice("a", "b"), "c", "x must be one of a, b, got 'c'"),
        (schema.many(schema.text), {}, "x must be a list, got {}"),
        (schema.many(schema.text), ["a", 1], "x[1] must be text, got 1"),
        (schema.by_name(schema.text), [], "x must be a mapping, got []"),
        (schema.by_name(schema.text), {"k": 1}, "x.k must be text, got 1"),
        (schema.by_name(schema.text), {"\ud800": ""}, "a key of x must be text in UTF-8"),
        (schema.record({"k": schema.text}), {}, "x has no k"),
        (schema.record({"k": schema.text}), None, "x must be a mapping, got None"),
        (schema.record({}, {"k": schema.text}), {"k": 1}, "x.k must be text, got 1"),
        (schema.plain, {"a": float("inf")}, "x.a must be a number, got inf"),
        (schema.plain, {"a": ["\ud800"]}, "x.a[0] must be text in UTF-8"),
        (schema.pair, [1], "x must be a step and a value, got [1]"),
        (schema.text, list(range(100)), "x must be text, got [0, 1, 2,"),
    ],
)
def test_a_wrong_value_is_named(check, value, message):
    with pytest.raises(LlmqatError, match=re.escape(message)) as raised:
        check(value, "x")
    assert len(str(raised.value)) < 150


def test_right_values_pass():
    schema.plain(PLAIN, "x")
    schema.optional(schema.text)(None, "x")
    schema.record({"k": schema.text})({"k": "v", "more": object()}, "x")
    schema.integer(-3, "x")


def test_values_nested_too_deep_are_refused():
    value = 1
    for _ in range(schema.DEPTH):
        value = [value]
    with pytest.raises(LlmqatError, match="must be nested 8 levels at most"):
        schema.plain(value, "x")


def test_a_run_writes_what_the_schema_says(finished):
    for name, check in (("report", schema.REPORT), ("details", schema.DETAILS)):
        check(json.loads((finished / f"{name}.json").read_text()), name)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": "\xff"}'.encode("latin-1"), b"\xff\xfe"])
def test_a_damaged_file_is_one_line(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(LlmqatError, match=r"report\.json is damaged; run it again, or copy it again"):
        schema.read(path, schema.REPORT)


@pytest.mark.parametrize("text", ["[]", "null", "1", '"x"', '{"format": 2}', "{}"])
def test_a_foreign_file_is_one_line(tmp_path, text):
    path = tmp_path / "report.json"
    path.write_text(text)
    with pytest.raises(LlmqatError, match=r"report\.json is not one of this version of llmqat: report.*; run it again"):
        schema.read(path, schema.REPORT)
