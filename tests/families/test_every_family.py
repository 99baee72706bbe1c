"""Kinds of causal language models that transformers has, from the float model to decoding; no row knows most of them.

A sample runs always; ``make test-families`` runs all. A family that llmqat refuses in one line is skipped with it, and
so is one of which no tiny model can be made.
"""

import pytest

from llmqat.errors import LlmqatError
from tests.families.check import run
from tests.families.tiny import FAMILIES, tiny_model

# Tuples from blocks, a tower beside them, a weight that is read by others, fused experts.
SAMPLE = ("bloom", "gemma3", "mamba", "olmoe")
# Its tokens are bytes, hashed into tables of 3 GB whatever the config says.
TOO_LARGE = ("blt",)


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--every-family")
    metafunc.parametrize("model_type", [f for f in (FAMILIES if everything else SAMPLE) if f not in TOO_LARGE])


def test_family(model_type, tmp_path):
    """Calibrated by GPTQ, trained for a step, packed, loaded by llmqat and by transformers, and decoded."""
    try:
        model = tiny_model(model_type)
    except Exception as error:  # sizes that have other names in this family, or depend on each other
        pytest.skip(f"no tiny model: {type(error).__name__}: {error}")
    try:
        run(model, tmp_path)
    except LlmqatError as error:
        assert model_type not in SAMPLE
        pytest.skip(f"refused: {error}")
