"""Tables of what was measured, and its ratios to the targets."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .catalog import A8, A8_KERNEL, A16, A16_KERNEL, BF16, PEERS, Q4_0, READ

SMALL_M = 16  # up to here a layer is bound by memory: tables give GB/s, above GFLOP/s

Row = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """A ratio that is asked for: `peer` over `against` at least `least`, wherever `where` holds."""

    peer: str
    against: str
    least: float
    where: dict[str, Any]


LAYER_TARGETS = (
    Target(A8_KERNEL, READ, 0.92, {"m": 1}),
    Target(A16_KERNEL, READ, 0.80, {"m": 1}),
    Target(A8, READ, 0.92, {"m": 1}),
    Target(A16, READ, 0.80, {"m": 1}),
    Target(A8, BF16, 1.4, {"m": 512}),
    Target(A16, BF16, 0.85, {"m": 512}),
)
MODEL_TARGETS = (
    Target(A8, Q4_0, 1.2, {"model": "llama-1b", "task": "decode"}),
    Target(A8, Q4_0, 2.5, {"model": "llama-1b", "task": "prefill 128"}),
    Target(A8, Q4_0, 2.5, {"model": "llama-1b", "task": "prefill 512"}),
    Target(A8, BF16, 5.0, {"model": "llama-1b", "task": "decode"}),
    Target(A8, BF16, 1.5, {"model": "llama-1b", "task": "prefill 128"}),
    Target(A8, BF16, 1.5, {"model": "llama-1b", "task": "prefill 512"}),
    Target(A16, Q4_0, 1.0, {"model": "llama-1b", "task": "decode"}),
    Target(A8, Q4_0, 1.0, {"model": "llama-110m", "task": "decode"}),
)
CONTENDED_LEAST = 0.5
CONTENDED_PEERS = (A8, A16)


def rates(row: Row, against: str) -> list[float]:
    """One value a round, greater is faster, in the unit in which `against` is comparable."""
    if "gb_s" in row:
        return row["gb_s"]["values"]
    if "tok_s" in row:
        return row["tok_s"]["values"]
    work = row["bytes"] / 1e9 if against == READ else 1.0
    return [work / seconds for seconds in row["seconds"]["values"]]


def ratio(own: list[float], other: list[float]) -> dict[str, float]:
    """Median and range of the ratios taken round by round."""
    found = [a / b for a, b in zip(own, other, strict=True)]
    return {"ratio": statistics.median(found), "min": min(found), "max": max(found)}


def verdicts(targets: tuple[Target, ...], rows: list[Row], place: tuple[str, ...]) -> Iterator[Row]:
    """Each target at each place where both sides were measured; `place` names the fields that say where."""
    by_place: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        if "failed" not in row:
            by_place.setdefault(tuple(row[key] for key in place), {})[row["peer"]] = row
    for target in targets:
        for at, found in by_place.items():
            here = dict(zip(place, at, strict=True))
            if any(here[key] != value for key, value in target.where.items()):
                continue
            if target.peer in found and target.against in found:
                sides = [rates(found[name], target.against) for name in (target.peer, target.against)]
                yield verdict({**here, "peer": target.peer, "against": target.against}, target.least, *sides)


def verdict(where: Row, least: float, own: list[float], other: list[float]) -> Row:
    """A ratio beside what is asked of it."""
    found = ratio(own, other)
    return {**where, **found, "target": least, "met": found["ratio"] >= least}


def layer_verdicts(rows: list[Row]) -> list[Row]:
    """Targets of single layers."""
    return list(verdicts(LAYER_TARGETS, rows, ("set", "layer", "m")))


def model_verdicts(rows: list[Row]) -> list[Row]:
    """Targets of whole models."""
    return list(verdicts(MODEL_TARGETS, rows, ("model", "task")))


def contention_verdicts(rows: list[Row]) -> list[Row]:
    """Speed beside a busy process, relative to the speed alone."""
    return [
        verdict(
            {"model": row["model"], "peer": row["peer"], "against": "quiet"},
            CONTENDED_LEAST,
            row["contended"]["values"],
            row["quiet"]["values"],
        )
        for row in rows
        if row["peer"] in CONTENDED_PEERS and "failed" not in row
    ]


def cell(found: Row, scale: float = 1.0, digits: int = 1) -> str:
    """Median and half the range in percent of it."""
    spread = (found["max"] - found["min"]) / 2 / found["median"]
    return f"{found['median'] * scale:,.{digits}f} ±{spread:.0%}"


def layer_cell(row: Row) -> str:
    """Microseconds with their spread, and the rate that bounds them."""
    if "failed" in row:
        return "failed"
    if "gb_s" in row:
        return f"{cell(row['gb_s'])} GB/s"
    small = row["m"] <= SMALL_M
    rate = f"{row['weight_gb_s']:.1f} GB/s" if small else f"{row['gflop_s']:,.0f} GF/s"
    return f"{cell(row['seconds'], 1e6, 0)} us {rate}"


def table(corner: str, lines: dict[str, dict[str, str]]) -> str:
    """Cells by line and peer, in columns of their own width; what was not measured is a dash."""
    peers = [name for name in PEERS if any(name in cells for cells in lines.values())]
    grid = [[corner, *peers], *([line, *(cells.get(name, "-") for name in peers)] for line, cells in lines.items())]
    widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
    return "\n".join(
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in grid
    )


def layer_tables(rows: list[Row]) -> Iterator[str]:
    """A table for each M."""
    for m in sorted({row["m"] for row in rows if "m" in row}):
        lines: dict[str, dict[str, str]] = {}
        for row in rows:
            if row.get("m", m) == m:
                line = f"{row['set']} {row['layer']} {row['out']}x{row['in']}"
                lines.setdefault(line, {}).setdefault(row["peer"], layer_cell(row))
        yield table(f"M = {m}", lines)


def model_table(rows: list[Row]) -> str:
    """Tokens per second by model and measurement."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if "failed" in row:
            continue
        text = f"{cell(row['gb_s'])} GB/s" if "gb_s" in row else cell(row["tok_s"])
        lines.setdefault(f"{row['model']} {row['task']}", {})[row["peer"]] = text
    return table("tokens/s", lines)


def contention_table(rows: list[Row]) -> str:
    """Tokens per second alone and beside a busy process."""
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        for state in ("quiet", "contended"):
            text = "failed" if "failed" in row else cell(row[state])
            lines.setdefault(f"{row['model']} {state}", {})[row["peer"]] = text
    return table("tokens/s", lines)


def target_table(found: list[Row]) -> str:
    """One line a target: where, ratio with its range, what is asked."""
    lines = []
    for row in found:
        where = " ".join(str(row[key]) for key in ("model", "task", "set", "layer") if key in row)
        at = f"{where} M={row['m']}" if "m" in row else where
        told = f"{row['ratio']:.2f} [{row['min']:.2f}, {row['max']:.2f}]"
        verdict_text = "met" if row["met"] else f"short by {1 - row['ratio'] / row['target']:.0%}"
        lines.append(f"{row['peer']} / {row['against']:<15} {at:<28} {told:>20}  >= {row['target']:<5} {verdict_text}")
    return "\n".join(lines)


def disturbed(rows: list[Row], limit: float) -> list[str]:
    """Where a sample stood although others took more than `limit` of the machine."""
    found = []
    for row in rows:
        for key in ("gb_s", "tok_s", "seconds", "quiet", "contended"):
            if key in row and row[key]["foreign"] > limit:
                where = " ".join(str(row[k]) for k in ("model", "task", "set", "layer", "m", "peer") if k in row)
                found.append(f"{where}: others took {row[key]['foreign']:.0%} of the machine")
    return found
