"""Charts as inline SVG: drawn here, coloured by the page's style sheet, readable without a script."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llmqat.report.page.markup import Html, element

# The size in user units is about that in CSS pixels on a phone, so that text keeps its size.
WIDTH, HEIGHT = 320, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 30
MARKED_POINTS = 24
# Values that differ by less are drawn as equal: a quarter of it is still a normal float.
LEAST_SPAN = 1e-300

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
    if span < LEAST_SPAN:
        return (low,)
    magnitude = 10.0 ** math.floor(math.log10(span / count))
    step = next(m * magnitude for m in (1, 2, 5, 10) if span / (m * magnitude) <= count + 1e-9)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(index * step for index in range(first, last + 1))


def three_digits(value: float) -> str:
    """A number for an axis: three digits, and no exponent where none is needed."""
    return f"{value:.3g}" if value == 0 or 1e-4 <= abs(value) < 1e4 else f"{value:.0e}".replace("e-0", "e-")


def percent(value: float) -> str:
    """A share for an axis."""
    return f"{100 * value:.3g}%"


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    y_format: Format = three_digits,
    *,
    from_zero: bool = False,
    mark: float | None = None,
    top: float | None = None,
) -> Html:
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
        return Html()
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x = axis(min(xs), max(xs), LEFT, WIDTH - RIGHT, 5)
    y = axis(0.0 if from_zero else min(ys), max(ys) if top is None else top, HEIGHT - BOTTOM, TOP, 4, widen=True)
    only_integers = all(value == int(value) for value in xs)
    x_ticks = [tick for tick in x.ticks if not only_integers or tick == int(tick)]
    parts = [_grid(y, y_format), _x_axis(x, x_ticks, x_label)]
    if mark is not None:
        place = f"{x(mark):.1f}"
        parts.append(element("line", class_="mark", x1=place, x2=place, y1=TOP, y2=HEIGHT - BOTTOM))
    parts += [_line(line, x, y, y_format, x_label) for line in drawn]
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=label)


def axis(low: float, high: float, start: float, end: float, count: int, widen: bool = False) -> Scale:
    """An axis that holds `low` to `high`; widened to its outermost ticks if asked."""
    if high - low < LEAST_SPAN:
        low, high = (low - 0.5 * abs(low or 1), low + 0.5 * abs(low or 1)) if widen else (low, low)
    ticks = nice_ticks(low, high, count)
    if widen and len(ticks) > 1:
        step = ticks[1] - ticks[0]
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        ticks = nice_ticks(low, high, count + 2)
    return Scale(low, high, start, end, ticks)


def _grid(y: Scale, y_format: Format) -> Html:
    lines = []
    for tick in y.ticks:
        place = y(tick)
        lines.append(element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{place:.1f}", y2=f"{place:.1f}"))
        lines.append(element("text", y_format(tick), x=LEFT - 6, y=f"{place + 3.5:.1f}", text_anchor="end"))
    return element("g", *lines)


def _x_axis(x: Scale, ticks: Sequence[float], label: str) -> Html:
    bottom = HEIGHT - BOTTOM
    marks = [element("text", three_digits(t), x=f"{x(t):.1f}", y=bottom + 14, text_anchor="middle") for t in ticks]
    name = element("text", label, class_="name", x=WIDTH - RIGHT, y=HEIGHT - 2, text_anchor="end")
    line = element("line", class_="axis", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom)
    return element("g", line, *marks, name)


def _line(line: Series, x: Scale, y: Scale, y_format: Format, x_label: str) -> Html:
    places = [(f"{x(a):.1f}", f"{y(b):.1f}") for a, b in line.points]
    shapes = [element("polyline", class_="line", points=" ".join(f"{a},{b}" for a, b in places))]
    if len(places) <= MARKED_POINTS:
        for (a, b), (place_x, place_y) in zip(line.points, places, strict=True):
            title = element("title", f"{line.label}, {x_label} {three_digits(a)}: {y_format(b)}")
            shapes.append(element("circle", title, class_="dot", cx=place_x, cy=place_y, r=2.6))
    return element("g", *shapes, class_=line.css)


def legend(series: Sequence[tuple[str, str]]) -> Html:
    """Labels with the colour of their CSS class: ``(label, css)``."""
    items = [element("li", element("span", aria_hidden="true"), label, class_=css) for label, css in series]
    return element("ul", *items, class_="legend")


def meter(share: float, css: str) -> Html:
    """A bar of `share` of its column, for a table cell: drawn, since the page allows no inline styles."""
    width = 100 * min(1.0, max(0.0, share))
    bar = element("rect", width=f"{width:.1f}%", height="100%", rx=4)
    return element("svg", bar, class_=f"meter {css}", aria_hidden="true")
