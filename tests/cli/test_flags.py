import re

import pytest

from llmqat.cli.flags import parse_override
from llmqat.errors import LlmqatError


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("o_proj$:float", ("o_proj$", "float")),
        ("a:b:bits=8", ("a:b", {"bits": 8})),
        ("x:bits=3,group_size=-1,symmetric=false", ("x", {"bits": 3, "group_size": -1, "symmetric": False})),
    ],
)
def test_override(text, parsed):
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["", "x", "x:", "x:8", "x:bits", "x:bits=", "x:bits=four", "x:bits=8,", "x:Float"])
def test_malformed_override(text):
    with pytest.raises(LlmqatError, match=f"cannot read --override {re.escape(repr(text))}; write 'PATTERN:float' or"):
        parse_override(text)
