"""`report.html`: one self-contained page from what a run wrote. No request leaves it."""

import json
from collections.abc import Mapping
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.report.details import NAME as DETAILS
from llmqat.report.page.sections import SECTIONS

REPORT, PAGE = "report.json", "report.html"
# What the page's script draws, of what `details.json` holds of a layer.
DRAWN = ("shape", "scheme", "codes_changed", "limit", "float", "grid", "first_code", "codes")


def render(report: Mapping[str, Any], details: Mapping[str, Any]) -> str:
    """The page.

    Args:
        report: `report.json`.
        details: `details.json`; what it lacks is left out of the page.
    """
    folder = files("llmqat.report.page")
    layers = [{key: layer[key] for key in DRAWN} for layer in details.get("layers", []) if "codes" in layer]
    return Template((folder / "template.html").read_text("utf-8")).substitute(
        title=escape(f"{report['model']}: llmqat report"),
        style=(folder / "style.css").read_text("utf-8"),
        body="\n".join(part for make in SECTIONS if (part := make(report, details))),
        data=json.dumps(layers, separators=(",", ":")).replace("<", "\\u003c"),
        script=(folder / "page.js").read_text("utf-8"),
    )


def write_page(directory: str | Path) -> Path:
    """Write `report.html` into the directory of a finished run, from its `report.json` and `details.json`.

    Args:
        directory: the ``--output`` of the run.

    Returns:
        path of the page.

    Raises:
        LlmqatError: if there is no readable `report.json`, or the directory cannot be written.
    """
    directory = Path(directory)
    report, details = _read(directory / REPORT), {}
    if report is None:
        raise LlmqatError(f"{directory} has no {REPORT}; `llmqat finetune` and `llmqat quantize` write one")
    details = _read(directory / DETAILS) or {}
    try:
        text = render(report, details)
    except (KeyError, TypeError, AttributeError) as error:
        raise LlmqatError(
            f"{directory / REPORT} is not a report of this version of llmqat ({error!r}); run it again"
        ) from error
    with replacing(directory) as scratch:
        (scratch / PAGE).write_text(text, encoding="utf-8")
    return directory / PAGE


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise LlmqatError(f"{path} is damaged; run it again, or copy it again") from error
    return found
