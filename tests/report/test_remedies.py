import re

import pytest

from llmqat.report.remedies import remedies
from llmqat.train.loop import TrainResult


def result(best_step=90, flipped=0.03, clip_rate=0.001):
    done = TrainResult(steps=100, best_step=best_step, clip_rate=clip_rate)
    done.flipped = {0: 0.0, 50: flipped, 100: flipped / 2}
    return done


@pytest.mark.parametrize(
    ("values", "mode", "said"),
    [
        ({}, "full", []),
        (
            {"flipped": 0.0001},
            "lora",
            ["flipped 0.010% of the codes at most, and what it learned is in scales and norms: give more steps"],
        ),
        ({"flipped": 0.0001}, "scales", []),  # whose codes stay
        ({"flipped": 0.0001, "best_step": 0}, "full", ["raise the learning rate"]),
        ({"best_step": 20}, "full", ["least at step 20 of 100, .* lower the learning rate"]),
        ({"best_step": 20, "clip_rate": 0.05}, "lora", ["lower the", "5.0% of the weights .* give --clip-mask"]),
    ],
)
def test_what_the_numbers_ask_for(values, mode, said):
    lines = remedies(result(**values), mode)
    assert len(lines) == len(said)
    for line, part in zip(lines, said, strict=True):
        assert re.search(part, line), line


def test_nothing_was_counted():
    assert remedies(TrainResult(steps=1, best_step=1), "full") == [
        "training flipped 0.000% of the codes at most, and what it learned is in scales and norms: give more steps "
        "(--max-steps), or raise the learning rate (--lr)"
    ]
