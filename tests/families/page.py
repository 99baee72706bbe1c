"""`docs/families.md`: how far every kind of causal model that transformers has came on its way, and why no farther."""

import re
from pathlib import Path
from typing import NamedTuple

import transformers

PAGE = Path(__file__).parents[2] / "docs" / "families.md"
HELD, EXPORTED, REFUSED, FOREIGN, FAILED, UNMADE = "held", "exported", "refused", "foreign", "failed", "unmade"
# Headings of the tables of kinds that did not come through, and a line of each in the table of counts.
REASONS = {
    REFUSED: "Refused in one line, before any work",
    FOREIGN: "The float model of transformers does not do it either",
    FAILED: "Does not hold",
    UNMADE: "No tiny model can be made",
}
LONGEST = 160

INTRODUCTION = """# Kinds of models

A tiny random model of every kind of causal model that transformers {version} has, on its whole way: GPTQ at 4 bits, a
training step, packed, loaded by llmqat and by plain transformers with equal weights, logits within the bound of
`llmqat verify`, and 8 tokens behind a cache equal to those without. `make test-families` writes this page; `make test`
runs 25 of them.
"""
APART = (
    "transformers has no packed experts of {}: it reads the exported model (`llmqat export --to dense`), in which they "
    "are one tensor for a block again."
)


class Row(NamedTuple):
    """How far a kind came: one of the words above, and why no farther."""

    outcome: str
    why: str = ""


def page(rows: dict[str, Row]) -> str:
    """The page, from a row by kind."""
    kinds = {outcome: sorted(k for k, row in rows.items() if row.outcome == outcome) for outcome in (HELD, *REASONS)}
    exported = sorted(kind for kind, row in rows.items() if row.outcome == EXPORTED)
    held = sorted(kinds[HELD] + exported)
    counts = [("Held", len(held)), *((REASONS[outcome], len(kinds[outcome])) for outcome in REASONS)]
    parts = [
        INTRODUCTION.format(version=transformers.__version__),
        table("", "kinds", [(n, str(c)) for n, c in counts]),
    ]
    parts += ["## Held\n", filled(held)]
    parts += [filled(exported, *APART.split("{}"))] if exported else []
    for outcome, heading in REASONS.items():
        if kinds[outcome]:
            parts += [
                f"## {heading}\n",
                table("kind", "why", [(f"`{k}`", shortened(rows[k].why)) for k in kinds[outcome]]),
            ]
    return "\n".join(parts)


def kinds_on(text: str) -> set[str]:
    """Names of the kinds that a page names."""
    lists = re.findall(r"^`[^|]*?`\n\n|^transformers has no packed experts of `.*?:", text, re.DOTALL | re.MULTILINE)
    return set(re.findall(r"`([\w-]+)`", "\n".join(lists))) | set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE))


def table(first: str, second: str, rows: list[tuple[str, str]]) -> str:
    lines = [f"| {first} | {second} |".replace("|  |", "| |"), "|---|---|", *(f"| {a} | {b} |" for a, b in rows)]
    return "\n".join(lines) + "\n"


def filled(kinds: list[str], before: str = "", after: str = "") -> str:
    """Names of kinds in lines of the usual width."""
    lines, line = [], ""
    for word in (before + ", ".join(f"`{kind}`" for kind in kinds) + after).split():
        if len(line) + len(word) > 126:
            lines.append(line.rstrip())
            line = ""
        line += f"{word} "
    return "\n".join([*lines, line.rstrip()]) + "\n"


def shortened(why: str) -> str:
    """The first clause of a reason, with nothing that would end a cell of a table."""
    first = re.split(r"; |, and \d+% are asked|\.? Please|\n", why.replace("|", "/").strip())[0].rstrip(".:")
    return first if len(first) <= LONGEST else first[: LONGEST - 3].rsplit(" ", 1)[0] + " ..."
