import io
import sys
from types import SimpleNamespace

import pytest
from IPython.display import HTML

from llmqat import progress
from llmqat.progress import Meter, duration, track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """Time that moves by hand: ``clock[0] += 20``."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_in_a_log(clock, capsys):
    with Meter("training", 4) as meter:
        for done in range(1, 5):
            clock[0] += 10
            meter.update(done, f"loss 0.{done}")
    assert capsys.readouterr().err.splitlines() == [
        "training: 2/4, 20 s, 20 s left, loss 0.2",
        "training: 4/4, 40 s, loss 0.4",
    ]


def test_short_work_prints_nothing(clock, capsys):
    assert list(track("abc", "reading", 3)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_time_left_counts_the_steps_of_this_process(clock, capsys):
    with Meter("training", 100, done=90) as meter:
        clock[0] += 20
        meter.update(92)
    assert capsys.readouterr().err == "training: 92/100, 20 s, 1 min 20 s left\n"


def test_bar_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    with Meter("training", 2) as meter:
        meter.update(1, "loss 0.5")
        meter.update(2, "loss 0.4 [x]")
    shown = screen.getvalue()
    for part in ("training", "2/2", "loss 0.4 [x]", "━"):
        assert part in shown


def test_html_in_a_notebook(clock, monkeypatch):
    shown = []
    handle = SimpleNamespace(update=lambda what: shown.append(what.data))
    fake = SimpleNamespace(HTML=HTML, display=lambda what, display_id: shown.append(what.data) or handle)
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(progress, "in_notebook", lambda: True)
    with Meter("a < b", 3) as meter:
        clock[0] += 1
        meter.update(1, "loss 1")
        meter.update(2, "too soon after")
        meter.update(3, "loss 3")
    first, second, last = shown
    assert "a &lt; b" in first
    assert 'value="1" max="3"' in second
    assert "1/3 <small>2 s left, loss 1</small>" in second
    assert "3/3 <small>loss 3</small>" in last


def test_a_plain_process_is_no_notebook():
    assert not progress.in_notebook()


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text
