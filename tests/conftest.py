"""Fixtures shared by all tests."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.scheme import QuantScheme

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
    "attn_implementation": "sdpa",
}


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., LlamaForCausalLM]:
    """``tiny_llama(**config)``: a random two-layer Llama in eval mode; the same one for the same arguments."""

    def make(**overrides: Any) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**TINY | overrides)).eval()

    return make


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    """Four calibration batches of token ids ``(2, 24)``."""
    return list(torch.randint(0, TINY["vocab_size"], (4, 2, 24)))


@pytest.fixture(params=[True, False], ids=["sym", "asym"])
def symmetric(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture(params=[2, 3, 4, 8], ids="{}bit".format)
def bits(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def scheme(bits: int, symmetric: bool) -> QuantScheme:
    """Every width, symmetric and not, in groups of 16."""
    return QuantScheme(bits, 16, symmetric)
