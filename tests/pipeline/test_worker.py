"""The worker in another Python: what it needs, and which versions it finds."""

from pathlib import Path

import numpy as np

from llmqat.pipeline import worker

HERE = Path(__file__).parent


def test_packages_that_are_missing_are_named():
    assert worker.run({"needs": ["numpy", "no_engine_of_this_name"]}, HERE) == {"missing": ["no_engine_of_this_name"]}


def test_versions():
    assert worker.installed("numpy") == ("numpy", np.__version__)
    assert worker.installed("llmqat")[0] == "llmqat"
