"""`report.html`: one self-contained page from what a run wrote. No request leaves it."""

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.report import schema
from llmqat.report.details import NAME as DETAILS
from llmqat.report.page.markup import join
from llmqat.report.page.sections import SECTIONS

REPORT, PAGE = "report.json", "report.html"
# What the page's script draws, of what `details.json` holds of a layer.
DRAWN = ("shape", "scheme", "codes_changed", "limit", "float", "grid", "first_code", "codes")


def render(report: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The page; its content security policy allows its own style sheet and script, and nothing else.

    Args:
        report: `report.json`, as `schema.REPORT` accepts it.
        details: `details.json`, as `schema.DETAILS` accepts it; what it lacks is left out of the page.
    """
    folder = files("llmqat.report.page")
    style, script = ("\n" + (folder / name).read_text("utf-8") for name in ("style.css", "page.js"))
    layers = [{key: layer[key] for key in DRAWN} for layer in details.get("layers", []) if "codes" in layer]
    return Template((folder / "template.html").read_text("utf-8")).substitute(
        title=escape(f"{report['model']}: llmqat report"),
        style=style,
        style_hash=_policy_hash(style),
        body=join((part for make in SECTIONS if (part := make(report, details))), "\n"),
        data=json.dumps(layers, separators=(",", ":")).replace("<", "\\u003c"),
        script=script,
        script_hash=_policy_hash(script),
    )


def _policy_hash(text: str) -> str:
    """The source expression that allows an element with this text, and no other."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def write_page(directory: str | Path) -> Path:
    """Write `report.html` into the directory of a finished run, from its `report.json` and `details.json`.

    Args:
        directory: the ``--output`` of the run.

    Returns:
        path of the page.

    Raises:
        LlmqatError: if there is no `report.json` that this version can read, or the directory cannot be written.
    """
    directory = Path(directory)
    if not (directory / REPORT).is_file():
        raise LlmqatError(f"{directory} has no {REPORT}; `llmqat finetune` and `llmqat quantize` write one")
    report = schema.read(directory / REPORT, schema.REPORT)
    details = schema.read(directory / DETAILS, schema.DETAILS) if (directory / DETAILS).is_file() else {}
    with replacing(directory) as scratch:
        (scratch / PAGE).write_text(render(report, details), encoding="utf-8")
    return directory / PAGE
