"""Configs that llama.cpp would compute otherwise are refused: it knows some things by the name of a family alone."""

import pytest
from transformers import CONFIG_MAPPING

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf_families import FAMILIES, family_of
from llmqat.models.architectures import ARCHITECTURES


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_family_as_it_comes(model_type):
    assert model_type in ARCHITECTURES
    assert family_of(CONFIG_MAPPING[model_type]()) is FAMILIES[model_type]


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("opt", {}, r"does not know the model type 'opt' \(known: llama, mistral, .*\); export to dense, and convert"),
        (
            "gemma2",
            {"head_dim": 16},
            "takes for granted of a gemma2 that query_pre_attn_scalar is the head dim",
        ),
        (
            "gemma2",
            {"layer_types": ["full_attention"] * 26},
            "every second layer sees all tokens, and this one",
        ),
        ("gemma3_text", {"layer_types": ["full_attention"] * 26}, "every sixth layer sees all tokens, and this one"),
        (
            "gemma",
            {"tie_word_embeddings": False},
            "the output head is tied to the embedding, and this one",
        ),
        (
            "llama",
            {"hidden_act": "relu"},
            "the activation is silu, and this one is otherwise; export",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}},
            "the rotary embedding is default or linear or llama3, and this one is otherwise",
        ),
    ],
)
def test_what_llama_cpp_would_compute_otherwise(model_type, changes, message):
    with pytest.raises(LlmqatError, match=message):
        family_of(CONFIG_MAPPING[model_type](**changes))


def test_the_largest_gemma_scales_by_its_width():
    sizes = {"num_hidden_layers": 46, "hidden_size": 4608, "num_attention_heads": 32, "head_dim": 128}
    assert family_of(CONFIG_MAPPING["gemma2"](query_pre_attn_scalar=144, **sizes)).architecture == "gemma2"
