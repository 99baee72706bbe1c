"""A model that is not what the row of its family says is left to transformers, and the reason names what differs."""

import re
from dataclasses import replace

import pytest
import torch

from llmqat.models.planning import plan
from llmqat.scheme import QuantScheme
from llmqat.serve import covered
from llmqat.serve.covered import decoding_in_words, why_config_not_covered
from llmqat.serve.families import FAMILIES, rotates_always, sees_all
from llmqat.serve.forward import accelerate_forward
from llmqat.serve.paths import path_counts
from tests.serve.helpers import float_model, packed_model, tiny_config


def why_not(model):
    """Why the blocks of a packed model do not run natively; empty if they do."""
    assert accelerate_forward(model) == (not path_counts(model).why_not)
    return path_counts(model).why_not


@pytest.mark.parametrize(
    ("option", "value"), [("use_bidirectional_attention", True), ("attn_logit_softcapping", 5.0)], ids=str
)
def test_an_option_that_the_row_does_not_name(option, value):
    assert why_not(packed_model("gemma3_text", **{option: value})) == (
        f"the native decoder does not know {option}={value!r} of the config"
    )


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("gemma4_text", {"use_bidirectional_attention": "vision"}, ""),
        ("gemma4_unified_text", {"use_bidirectional_attention": None}, ""),
        (
            "gemma4_text",
            {"use_bidirectional_attention": "all"},
            "the native decoder does not know use_bidirectional_attention='all' of the config",
        ),
        (
            "gemma4_text",
            {"enable_moe_block": True, "num_experts": 4},
            "the native decoder does not know enable_moe_block=True, num_experts=4 of the config",
        ),
        ("gemma4_text", {"global_head_dim": 640}, "heads of 640 features exceed the 512 of the kernels"),
        ("llama", {"head_dim": 640}, "heads of 640 features exceed the 512 of the kernels"),
    ],
)
def test_a_config_alone(family, options, reason):
    assert why_config_not_covered(tiny_config(family, **options)) == reason


def test_an_option_of_tomorrow(monkeypatch):
    """One that transformers adds to the config of a known family: known here only once somebody says so."""
    assert not why_not(packed_model("llama", attention_bias=True))
    monkeypatch.setattr(covered, "FOLLOWED", covered.FOLLOWED - {"attention_bias"})
    assert not why_not(packed_model("llama")), "as its class leaves it, it is what the tests of the family ran on"
    assert why_not(packed_model("llama", attention_bias=True)) == (
        "the native decoder does not know attention_bias=True of the config"
    )


@pytest.mark.parametrize(
    ("family", "field", "otherwise", "option"),
    [
        ("mistral", "window", sees_all, "sliding_window=8"),
        ("smollm3", "rotates", rotates_always, "no_rope_layers=[0, 1]"),
        ("granite", "residual_scale", "", "residual_multiplier=0.6"),
        ("gemma2", "attention_cap", "", "attn_logit_softcapping=2.0"),
    ],
)
def test_a_row_without_what_the_config_asks_for(monkeypatch, family, field, otherwise, option):
    options = {"sliding_window": 8} if family == "mistral" else {}
    model = packed_model(family, **options)
    monkeypatch.setitem(FAMILIES, family, replace(FAMILIES[family], **{field: otherwise}))
    assert why_not(model) == f"the native decoder does not know {option} of the config"


def test_a_gate_of_the_output_that_the_row_does_not_name(monkeypatch):
    monkeypatch.setitem(FAMILIES, "qwen3_5_text", replace(FAMILIES["qwen3_5_text"], output_gate=False))
    assert why_not(packed_model("qwen3_5_text")) == "the shapes of a block are not those of the config"


def test_blocks_of_mixers_alone():
    model = packed_model("qwen3_5_text", num_hidden_layers=1, layer_types=["linear_attention"])
    assert why_not(model) == "no block has attention"


def sinks(model):
    model.model.layers[1].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))


def norm_bias(model):
    model.model.layers[1].input_layernorm.bias = torch.nn.Parameter(torch.zeros(64))


def another_factor(model):
    model.model.layers[1].self_attn.scaling = 1.0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (sinks, "the native decoder does not know self_attn.sinks of a block"),
        (norm_bias, "the native decoder does not know input_layernorm.bias of a block"),
        (another_factor, "layers scale the scores of their attention by different factors"),
    ],
)
def test_blocks_that_hold_more(change, reason):
    model = packed_model("llama")
    change(model)
    assert why_not(model) == reason


def test_a_model_without_blocks_where_they_are_looked_for():
    assert why_not(packed_model("llama").model) == "a LlamaModel has no decoder stack below its head"


def test_how_mixers_will_be_run():
    model = float_model("qwen3_5_text")
    words = "blocks and sampling natively, linear_attn in torch"
    assert decoding_in_words(model, plan(model, QuantScheme(4, 32))) == words


@pytest.mark.parametrize(
    ("family", "scheme", "overrides", "words"),
    [
        ("llama", QuantScheme(4, 32), {}, "^blocks and sampling natively$"),
        ("phi3", QuantScheme(4, -1), {}, "^blocks and sampling natively$"),
        ("llama", QuantScheme(4, 32), {r"1\.mlp\.up": "float"}, r"\(model.layers.1.mlp.up_proj stays float\)$"),
        (
            "llama",
            QuantScheme(4, 8),
            {},
            r"^packed .* torch \(model.layers.0.self_attn.q_proj has .* no multiple of 16",
        ),
        ("llama", QuantScheme(4, 32, act_bits=8, act_static=True), {}, "q_proj has static activations, or groups"),
    ],
)
def test_how_a_plan_will_be_decoded(tiny, family, scheme, overrides, words):
    model = tiny(family)
    assert re.search(words, decoding_in_words(model, plan(model, scheme, overrides)))
