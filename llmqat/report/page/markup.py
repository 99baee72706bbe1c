"""HTML that is escaped by construction: pages are built of `element`, and nothing else makes `Html`."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

Values = Mapping[str, Any]


class Html(str):
    """Text that is HTML already; any other string is escaped where it is put into HTML."""


def join(parts: Iterable[str | None], separator: str = "") -> Html:
    """Several pieces as one; those that are not `Html` are escaped, None is left out."""
    return Html(separator.join(part if isinstance(part, Html) else escape(part) for part in parts if part is not None))


def element(tag: str, *children: str | None, **attributes: object) -> Html:
    """An element with its children and attributes, all of them escaped unless they are `Html`.

    Args:
        tag: its name.
        children: what it holds; None is left out.
        attributes: ``class_`` and ``aria_label`` stand for ``class`` and ``aria-label``; True is an attribute without
            a value, None is none.
    """
    written = "".join(
        f" {name.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(str(value))}"')
        for name, value in attributes.items()
        if value is not None
    )
    return Html(f"<{tag}{written}>{join(children)}</{tag}>")


def section(title: str, note: str, body: str) -> Html:
    """A section with its heading; empty without a body."""
    if not body:
        return Html()
    paragraph = element("p", note, class_="note") if note else None
    return element("section", element("h2", title), paragraph, body)


def table(head: Sequence[str | None], rows: Sequence[Html]) -> Html:
    """A table in a box that scrolls sideways where it has to.

    Args:
        head: names of the columns; None is a column of bars, for the eye only.
        rows: ``<tr>`` elements.
    """
    bars = element("td", class_="bar")
    names = [bars if name is None else element("th", name, scope="col") for name in head]
    body = element("tbody", join(rows, "\n"))
    return element("div", element("table", element("thead", element("tr", *names)), body), class_="scroll", tabindex=0)


def table_row(name: str, *cells: str | None, class_: str | None = None) -> Html:
    """A ``<tr>``: its name, then its cells; a cell that is a ``<td>`` already stays one."""
    done = [c if isinstance(c, Html) and c.startswith("<td") else element("td", c) for c in cells]
    return element("tr", element("th", name, scope="row"), *done, class_=class_)


def definitions(pairs: Iterable[tuple[str, str | None]]) -> Html:
    """Names and values, side by side; a value of None was not measured and is left out."""
    items = [element("div", element("dt", name), element("dd", value)) for name, value in pairs if value is not None]
    return element("dl", *items, class_="facts") if items else Html()


def formatted(value: float | None, form: str) -> str | None:
    """A number in a format like ``{:.2f} MB``, or None."""
    return None if value is None else form.format(value)
