"""The page of all kinds is what the newest transformers has."""

import re

import pytest
import transformers

from tests.families.page import EXPORTED, FAILED, FOREIGN, HELD, PAGE, REFUSED, UNMADE, Row, kinds_on, page
from tests.families.tiny import FAMILIES


def test_the_page_names_every_kind():
    text = PAGE.read_text("utf-8")
    version = re.search(r"transformers (\d+\.\d+)\.", text)[1]
    if not transformers.__version__.startswith(f"{version}."):
        pytest.skip(f"written with transformers {version}: make test-families writes it with the newest")
    assert kinds_on(text) == set(FAMILIES)


def test_every_outcome_has_its_place():
    rows = {
        "one": Row(HELD),
        "two-b": Row(EXPORTED),
        "three": Row(REFUSED, "only 3% lie there, and 90% are asked for; allow it"),
        "four": Row(FOREIGN, "off | by 4"),
        "five": Row(FAILED, "word " * 60),
        "six": Row(UNMADE, "needs timm. Please install it"),
    }
    text = page(rows)
    assert kinds_on(text) == set(rows)
    assert "\n`one`, `two-b`\n" in text
    assert "transformers has no packed experts of `two-b`: it reads" in text
    assert "| Held | 2 |" in text
    assert "| `three` | only 3% lie there |" in text
    assert "| `four` | off / by 4 |" in text
    assert "| `six` | needs timm |" in text
    assert max(map(len, text.splitlines())) < 200
