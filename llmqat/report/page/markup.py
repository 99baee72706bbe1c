"""Pieces of HTML that the sections share."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

Values = Mapping[str, Any]


def section(title: str, note: str, body: str) -> str:
    """A section with its heading; an empty string without a body."""
    if not body:
        return ""
    paragraph = f'<p class="note">{note}</p>\n' if note else ""
    return f"<section>\n<h2>{title}</h2>\n{paragraph}{body}\n</section>"


def table(head: Sequence[str | None], rows: Sequence[str]) -> str:
    """A table in a box that scrolls sideways where it has to.

    Args:
        head: names of the columns; None is a column of bars, for the eye only.
        rows: ``<tr>`` elements.
    """
    bars = '<td class="bar"></td>'
    cells = "".join(bars if name is None else f'<th scope="col">{name}</th>' for name in head)
    body = "\n".join(rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def facts(pairs: Sequence[tuple[str, str | None]]) -> str:
    """Names and values, side by side; a value of None was not measured and is left out."""
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs if value is not None)
    return f'<dl class="facts">{items}</dl>' if items else ""


def written(value: float | None, form: str) -> str | None:
    """A number in a format like ``{:.2f} MB``, or None."""
    return None if value is None else form.format(value)
