import re
import xml.etree.ElementTree as ElementTree

import pytest

from llmqat.report.page.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    line_chart,
    meter,
    nice_ticks,
    percent,
    three_digits,
)


def polyline(svg, css):
    """Points of the line of class `css`."""
    (group,) = [g for g in ElementTree.fromstring(svg).iter("g") if g.get("class") == css]
    return [tuple(map(float, pair.split(","))) for pair in group.find("polyline").get("points").split()]


def test_a_line_runs_from_corner_to_corner():
    svg = line_chart([Series("loss", "qat", [(0, 4.0), (5, 3.0), (10, 0.0)])], "falls", "step")
    points = polyline(svg, "qat")
    assert points[0] == (LEFT, TOP)
    assert points[-1] == (WIDTH - RIGHT, HEIGHT - BOTTOM)
    middle = (points[1][0] - LEFT) / (WIDTH - RIGHT - LEFT), (HEIGHT - BOTTOM - points[1][1]) / (HEIGHT - BOTTOM - TOP)
    assert middle == pytest.approx((0.5, 0.75), abs=1e-3)
    assert ElementTree.fromstring(svg).get("aria-label") == "falls"


def test_points_are_named_and_text_is_escaped():
    svg = line_chart([Series("a < b", "rtn", [(0, 0.25), (1, 0.5)])], '"x" & y', "block", percent, from_zero=True)
    root = ElementTree.fromstring(svg)
    assert [title.text for title in root.iter("title")] == ["a < b, block 0: 25%", "a < b, block 1: 50%"]
    assert root.get("aria-label") == '"x" & y'
    assert "0%" in [text.text for text in root.iter("text")]


def test_long_lines_have_no_dots_and_a_mark_is_drawn():
    svg = line_chart([Series("loss", "qat", [(step, 1.0 + step) for step in range(100)])], "", "step", mark=50)
    assert "circle" not in svg
    mark = re.search(r'class="mark" x1="([\d.]+)"', svg)
    assert float(mark[1]) == pytest.approx(LEFT + 50 / 99 * (WIDTH - LEFT - RIGHT), abs=0.1)


def test_nothing_to_draw():
    assert line_chart([Series("loss", "qat", [])], "", "step") == ""


@pytest.mark.parametrize("points", [[(0, 1.5)], [(0, 0.0), (1, 0.0)], [(3, -2.0), (4, -2.0)]])
def test_a_flat_line_stays_inside(points):
    for _, y in polyline(line_chart([Series("loss", "qat", points)], "", "step", from_zero=points[0][1] >= 0), "qat"):
        assert TOP <= y <= HEIGHT - BOTTOM


@pytest.mark.parametrize(
    ("low", "high", "count", "ticks"),
    [
        (0, 10, 5, (0, 2, 4, 6, 8, 10)),
        (0, 1, 4, (0, 0.5, 1)),
        (0.013, 0.021, 4, (0.014, 0.016, 0.018, 0.02)),
        (3, 3, 4, (3,)),
    ],
)
def test_ticks_are_round(low, high, count, ticks):
    assert nice_ticks(low, high, count) == pytest.approx(ticks)


def test_numbers_are_short():
    values = (0, 0.5, 1234, 20000, 0.00002)
    assert [three_digits(value) for value in values] == [
        "0",
        "0.5",
        "1.23e+03",
        "2e+04",
        "2e-5",
    ]
    assert percent(0.0123) == "1.23%"


def test_meter_stays_inside_its_column():
    assert 'width="100.0%"' in meter(1.7, "qat")
    assert 'width="0.0%"' in meter(-1, "qat")


def test_extreme_values_are_drawn():
    """Whatever `report/schema.py` lets through has a chart."""
    extremes = (-1e100, -1.0, 0.0, 5e-324, 1e-300, 1.0, 1.0 + 2e-16, 1e100)
    for low in extremes:
        for high in extremes:
            points = [(0.0, low), (1.0, high)]
            assert "polyline" in line_chart([Series("a", "qat", points)], "label", "x")
            assert "polyline" in line_chart([Series("a", "qat", [(low, 0.0), (high, 1.0)])], "label", "x")
