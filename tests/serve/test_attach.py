"""The one seam that patches a model."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.serve import attach as module
from llmqat.serve.attach import attach
from tests.serve.helpers import PROMPT, generate, packed_model


def test_both_paths_write_the_same(steps, greedy_steps):
    """Greedy tokens: natively, by transformers, and recomputed without a cache."""
    for kv_bits in (None, 8):
        options = {"lm_head_bits": 8, "tie_word_embeddings": True, "kv_bits": kv_bits}
        model, plain = attach(packed_model("llama", **options)), attach(packed_model("llama", **options), native=False)
        tokens = generate(model, max_new_tokens=64)
        assert len(greedy_steps) == 63
        greedy_steps.clear()
        assert torch.equal(generate(plain, max_new_tokens=64), tokens)
        assert torch.equal(generate(plain, max_new_tokens=64, use_cache=False), tokens)
        assert greedy_steps == []


def test_activations_of_another_name():
    with pytest.raises(LlmqatError, match="activations must be 'int8', or left out for those of training; got 'int4'"):
        attach(packed_model("llama"), activations="int4")


def test_a_transformers_that_is_not_recognised_is_said(monkeypatch, capsys):
    monkeypatch.setattr(module, "why_not_recognised", lambda: "transformers 9.0 is strange")
    model = attach(packed_model("llama"))
    assert "forward" not in vars(model.model)
    assert "not natively: transformers 9.0 is strange" in capsys.readouterr().err
    assert generate(model).shape == (1, PROMPT.shape[1] + 20)
