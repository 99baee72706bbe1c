"""Kinds of causal language models that transformers has, from the float model to decoding; no row knows most of them.

A sample runs always; ``make test-families`` runs all and writes the page. A family that llmqat refuses in one line is
skipped with it, and so is one of which no tiny model can be made, or whose float model does not decode either.
"""

import pytest

from llmqat.errors import LlmqatError
from tests.families.check import Foreign, run
from tests.families.tiny import FAMILIES, tiny_model

# Each has what no other has, or not so; GPT-2, Phi-3 and Mixtral go their way in tests/models.
SAMPLE = {
    "bart": "the decoder of an encoder-decoder, learned positions",
    "bloom": "tuples from blocks, a head's query, key and value in turn",
    "cohere2": "attention and MLP side by side, a scaled head",
    "deepseek_v3": "latent attention, shared experts",
    "exaone4": "norms behind, layers without rotary embedding",
    "falcon_h1": "attention and a state space side by side, multipliers",
    "gemma3": "a tower for images beside the decoder",
    "gemma4": "an embedding for each layer, heads of two widths",
    "glm4_moe": "a router with a bias, half a rotary embedding",
    "gpt_oss": "experts in one tensor, interleaved, with biases, sinks",
    "granitemoehybrid": "experts that no file has apart, beside a state space",
    "hrm_text": "two lists of blocks that take turns",
    "kimi_linear": "linear attention with a gate for each channel",
    "lfm2_moe": "short convolutions, some layers without experts",
    "llama4_text": "experts that are given their tokens",
    "mamba": "a weight that is read by others",
    "mllama": "layers for images, which text does not take",
    "nemotron_h": "experts without a gate, blocks of one part each",
    "olmo2": "norms behind, and on queries and keys",
    "qwen3_5": "linear attention without experts",
    "qwen3_next": "linear attention, a shared expert with a gate",
    "recurrent_gemma": "a recurrence, matrices for each head",
}


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
