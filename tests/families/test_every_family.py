"""Kinds of causal language models that transformers has, from the float model to decoding; no row knows most of them.

A sample runs always; ``make test-families`` runs all and writes the page. A family that llmqat refuses in one line is
skipped with it, and so is one of which no tiny model can be made, or whose float model does not decode either.
"""

import pytest

from llmqat.errors import LlmqatError
from tests.families.check import Foreign, run
from tests.families.tiny import FAMILIES, tiny_model

# Tuples from blocks; latent attention and shared experts; a tower beside them; experts in one tensor, interleaved;
# experts that are given their tokens; a weight that is read by others; no gate; linear attention.
SAMPLE = ("bloom", "deepseek_v3", "gemma3", "gpt_oss", "llama4_text", "mamba", "nemotron_h", "qwen3_next")


def pytest_generate_tests(metafunc):
    if "model_type" in metafunc.fixturenames:
        metafunc.parametrize("model_type", FAMILIES if metafunc.config.getoption("--every-family") else SAMPLE)


def test_family(model_type, tmp_path, record_property):
    """Calibrated by GPTQ, trained for a step, packed, loaded by llmqat and by transformers, and decoded."""
    try:
        model = tiny_model(model_type)
    except Exception as error:  # sizes that have other names in this family, or depend on each other
        pytest.skip(f"no tiny model: {error}")
    try:
        record_property("exported", run(model, tmp_path / "packed"))
    except LlmqatError as error:
        assert model_type not in SAMPLE
        pytest.skip(f"refused: {error}")
    except Foreign as error:
        pytest.skip(f"transformers: {error}")
