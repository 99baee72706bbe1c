"""Charts as inline SVG: drawn here, coloured by the page's style sheet, readable without a script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

# The size in user units is about that in CSS pixels on a phone, so that text keeps its size.
WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30
MARKED_POINTS = 24

Format = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line: its label, the CSS class that colours it, and points ``(x, y)`` in order of x."""

    label: str
    css: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Scale:
    """A linear axis from `low` to `high` on `start` to `end` user units, with a mark at each of `ticks`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        """Place of a value."""
        span = self.high - self.low or 1.0
        return self.start + (value - self.low) / span * (self.end - self.start)


def nice_ticks(low: float, high: float, count: int) -> tuple[float, ...]:
    """About `count` round numbers from `low` to `high`: multiples of 1, 2 or 5 times a power of ten."""
    span = high - low
    if span <= 0:
        return (low,)
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= count + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def short(value: float) -> str:
    """A number for an axis: three digits, and no exponent where none is needed."""
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e4 else f"{value:.0e}".replace("e-0", "e-")


def percent(value: float) -> str:
    """A share for an axis."""
    return f"{100 * value:.3g}%"


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    y_format: Format = short,
    *,
    from_zero: bool = False,
    mark: float | None = None,
    top: float | None = None,
) -> str:
    """Lines over one x axis.

    Args:
        series: what to draw; those without points are left out.
        label: what the chart shows, in words, for those who do not see it.
        x_label: name of the x axis.
        y_format: how values are written.
        from_zero: whether the y axis starts at zero.
        mark: an x value to point out.
        top: end of the y axis; by default the greatest value.

    Returns:
        an ``<svg>`` element; an empty string where there is nothing to draw.
    """
    drawn = [line for line in series if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x = axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, 5)
    y = axis(0.0 if from_zero else min(ys), max(ys) if top is None else top, HEIGHT - BOTTOM, TOP, 4, widen=True)
    whole = all(value == int(value) for value in xs)
    x_ticks = [tick for tick in x.ticks if not whole or tick == int(tick)]
    parts = [_grid(y, y_format), _x_axis(x, x_ticks, x_label)]
    if mark is not None:
        parts.append(f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    parts += [_line(line, x, y, y_format, x_label) for line in drawn]
    return _svg(label, parts)


def axis(low: float, high: float, start: float, end: float, count: int, widen: bool = False) -> Scale:
    """An axis that holds `low` to `high`; widened to its outermost ticks if asked."""
    if high <= low:
        low, high = (low - 0.5 * abs(low or 1), low + 0.5 * abs(low or 1)) if widen else (low, low)
    ticks = nice_ticks(low, high, count)
    if widen and len(ticks) > 1:
        step = ticks[1] - ticks[0]
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        ticks = nice_ticks(low, high, count + 2)
    return Scale(low, high, start, end, ticks)


def _grid(y: Scale, y_format: Format) -> str:
    lines = []
    for tick in y.ticks:
        place = y(tick)
        lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{place:.1f}" y2="{place:.1f}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{place + 3.5:.1f}" text-anchor="end">{escape(y_format(tick))}</text>')
    return "".join(lines)


def _x_axis(x: Scale, ticks: Sequence[float], label: str) -> str:
    bottom = HEIGHT - BOTTOM
    marks = [f'<text x="{x(t):.1f}" y="{bottom + 14}" text-anchor="middle">{short(t)}</text>' for t in ticks]
    name = f'<text class="name" x="{WIDTH - RIGHT}" y="{HEIGHT - 2}" text-anchor="end">{escape(label)}</text>'
    return f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>{"".join(marks)}{name}'


def _line(line: Series, x: Scale, y: Scale, y_format: Format, x_label: str) -> str:
    places = [(x(a), y(b)) for a, b in line.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    shape = f'<polyline class="line" points="{path}"/>'
    if len(places) <= MARKED_POINTS:
        for (a, b), (place_x, place_y) in zip(line.points, places, strict=True):
            title = escape(f"{line.label}, {x_label} {short(a)}: {y_format(b)}")
            shape += (
                f'<circle class="dot" cx="{place_x:.1f}" cy="{place_y:.1f}" r="2.6"><title>{title}</title></circle>'
            )
    return f'<g class="{line.css}">{shape}</g>'


def _svg(label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def legend(series: Sequence[tuple[str, str]]) -> str:
    """Labels with the colour of their CSS class: ``(label, css)``."""
    items = "".join(f'<li class="{css}"><span aria-hidden="true"></span>{escape(label)}</li>' for label, css in series)
    return f'<ul class="legend">{items}</ul>'


def meter(share: float, css: str) -> str:
    """A bar of `share` of its column, for a table cell."""
    width = 100 * min(1.0, max(0.0, share))
    return f'<span class="meter {css}" aria-hidden="true"><span style="width:{width:.1f}%"></span></span>'
