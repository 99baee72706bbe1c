"""A config computes what a GGUF file says, where transformers leaves the defaults of a family."""

from types import SimpleNamespace

import numpy as np
import pytest

from llmqat.errors import LlmqatError
from llmqat.models.gguf_config import correct


def test_rotary_frequencies():
    config = SimpleNamespace(model_type="mistral", rope_parameters={"rope_theta": 1e4}, sliding_window=4096)
    facts = {"general.architecture": "llama", "llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    correct(config, facts, None, "a.gguf")
    assert config.rope_parameters == {"rope_theta": 1e4, "rope_type": "linear", "factor": 4.0}
    assert config.sliding_window is None
    both = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = SimpleNamespace(model_type="gemma3_text", rope_parameters=both)
    correct(config, facts, None, "a.gguf")
    assert config.rope_parameters["full_attention"] == {"rope_theta": 1e6, "rope_type": "linear", "factor": 4.0}
    assert config.rope_parameters["sliding_attention"] == {"rope_theta": 1e4}
    with pytest.raises(LlmqatError, match=r"a\.gguf scales rotary frequencies otherwise than Llama 3 does; start from"):
        correct(
            SimpleNamespace(model_type="llama", rope_parameters={"rope_theta": 1e4}), facts, np.full(8, 2.0), "a.gguf"
        )
