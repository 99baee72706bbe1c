"""Report files, changed anywhere: each ends in a page without foreign markup, or in a `LlmqatError` of one line."""

import json
import re
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmqat.errors import LlmqatError
from llmqat.report.page.render import write_page
from tests.fuzz.changes import changed
from tests.fuzz.conftest import time_limit

MARKUP = """<img src=x onerror=alert(1)>"'&</script><script>alert(2)</script>"""
NAMES = ("report.json", "details.json")

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(), max_size=20)
    | st.sampled_from([MARKUP, "", 0, -1, 10**400, 1e308, 5e-324, "\ud800", "nan", "__proto__"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)

values_or_markup = values | st.just(MARKUP)
keys = st.text(max_size=8) | st.just(MARKUP)


class Tags(HTMLParser):
    """Every element of a page, with its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, attrs))


@pytest.fixture(scope="session")
def files(finished):
    """The two files of a run, as text."""
    return {name: (finished / name).read_text() for name in NAMES}


def page_of(files):
    """The page of these files, or None where they are refused in one line."""
    with tempfile.TemporaryDirectory() as directory, time_limit():
        for name, data in files.items():
            Path(directory, name).write_bytes(data)
        try:
            return write_page(directory).read_text("utf-8")
        except LlmqatError as error:
            refused = str(error)
        assert "\n" not in refused
        assert not Path(directory, "report.html").exists()
        return None


def assert_clean(page):
    """Nothing came into the page but what the report draws."""
    found = Tags(page).found
    assert [tag for tag, _ in found].count("script") == 2
    assert {tag for tag, _ in found}.isdisjoint({"img", "iframe", "object", "embed", "base", "form", "link", "a"})
    assert not [name for _, attributes in found for name, _ in attributes if re.match("on|style|href|src", name)]


@given(data=st.data())
def test_another_value_anywhere(files, data):
    parsed = {name: json.loads(text) for name, text in files.items()}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(NAMES))
        parsed[name] = changed(parsed[name], data.draw, values_or_markup, keys)
    page = page_of({name: json.dumps(value).encode() for name, value in parsed.items()})
    if page is not None:
        assert_clean(page)


@given(data=st.data())
def test_other_bytes(files, data):
    name = data.draw(st.sampled_from(NAMES))
    raw = bytearray(files[name].encode())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(raw)))
        end = data.draw(st.integers(start, min(len(raw), start + 40)))
        raw[start:end] = data.draw(st.binary(max_size=40) | st.just(MARKUP.encode()))
    page = page_of({other: text.encode() for other, text in files.items()} | {name: bytes(raw)})
    if page is not None:
        assert_clean(page)


@given(value=values)
def test_any_json(files, value):
    assert page_of({"report.json": json.dumps(value).encode()}) is None
    page = page_of({"report.json": files["report.json"].encode(), "details.json": json.dumps(value).encode()})
    assert page is None or isinstance(value, dict)
