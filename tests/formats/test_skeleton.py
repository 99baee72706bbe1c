"""Config and headers that do not belong together, each named before a tensor is read."""

import json
import resource
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from llmqat.errors import LlmqatError
from llmqat.formats.reader import quantization_of
from llmqat.formats.skeleton import expected_headers, skeleton
from llmqat.formats.weights import tensor_headers
from llmqat.models.stored import Header
from llmqat.models.ties import shared_ties

UP, NORM, APART = "model.layers.0.mlp.up_proj", "model.norm", r"its weights and config\.json do not belong together"


@pytest.fixture
def build(packed):
    """``build(headers, config)``: the skeleton of the packed model with other headers and keys of config.json."""

    def make(changes=None, **config):
        path = packed[1] / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
        found = {**tensor_headers(packed[1]), **(changes or {})}
        found = {name: header for name, header in found.items() if header is not None}
        return skeleton(packed[1], quantization_of(packed[1]), found, None)

    return make


def test_what_fits(build, packed):
    model = build()
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    assert expected_headers(model) == tensor_headers(packed[1])


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "head_dim"])
def test_sizes_that_no_file_of_this_size_has(build, key):
    """Before a model of that size is built."""
    with pytest.raises(LlmqatError, match=rf"config\.json: {key} is 1048576, but the file lacks .*; {APART}"):
        build(**{key: 1 << 20})


NOTHING_PACKED = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
WIDE = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2}
# Masks of positions squared, tables of rotary and sinusoidal positions, learned positions, ALiBi -> config, key.
POSITIONS = {
    "gpt2": (GPT2, "n_positions"),
    "gpt_bigcode": (GPT2, "n_positions"),
    "gpt_neo": (
        {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
        "max_position_embeddings",
    ),
    "gptj": (GPT2 | {"rotary_dim": 8}, "n_positions"),
    "codegen": (GPT2 | {"rotary_dim": 8, "n_head": 4}, "n_positions"),
    "xglm": ({"d_model": 32, "num_layers": 2, "attention_heads": 2, "ffn_dim": 64}, "max_position_embeddings"),
    "opt": (
        {"hidden_size": 32, "word_embed_proj_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64},
        "max_position_embeddings",
    ),
    "mpt": ({"d_model": 32, "n_layers": 2, "n_heads": 2}, "max_seq_len"),
    "llama": ({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}, "max_position_embeddings"),
}
# Positions -> families whose tables of that length are small, or made for the tokens there are.
HARMLESS = {1 << 15: ("gptj", "codegen", "xglm", "mpt", "llama"), 1 << 24: ("mpt", "llama"), 1 << 40: ()}


@pytest.mark.parametrize("positions", [1 << 15, 1 << 24, 1 << 40])
@pytest.mark.parametrize("family", POSITIONS)
def test_positions_that_would_take_much_memory(tmp_path, family, positions):
    """Refused by the buffers, the number, or the table in the file, before any of it is made; or harmless."""
    values, key = POSITIONS[family]
    small = CONFIG_MAPPING[family](**WIDE | values | {key: 64})
    model = AutoModelForCausalLM.from_config(small)
    state, tied = model.state_dict(), shared_ties(model)
    found = {name: Header("F32", tuple(tensor.shape)) for name, tensor in state.items() if name not in tied}
    small.architectures = [type(model).__name__]
    small.save_pretrained(tmp_path)
    skeleton(tmp_path, NOTHING_PACKED, found, None)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: positions}))
    refused = r"config\.json asks for \d+ MB of masks and tables beside the weights, and llmqat makes at most 256 MB"
    refused += rf"|{key.replace('n_positions', 'max_position_embeddings')} is \d+, and no model sees more than 16777216"
    refused += r"|size mismatch for"
    with nullcontext() if family in HARMLESS[positions] else pytest.raises(LlmqatError, match=refused):
        skeleton(tmp_path, NOTHING_PACKED, found, None)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kilobytes


@pytest.mark.parametrize("changes", [{"num_attention_heads": 0}, {"hidden_act": "nope"}, {"rms_norm_eps": "x"}])
def test_a_model_that_transformers_cannot_build(build, changes):
    with pytest.raises(
        LlmqatError, match=r"(cannot build the model that|cannot use) .*config\.json.*; .*rite the model"
    ):
        build(**changes)


@pytest.mark.parametrize("architectures", ["torch", ["AutoConfig"], [], [3], ["torch.nn.Linear"], {"a": "b"}])
def test_a_class_that_is_no_model(build, architectures):
    with pytest.raises(
        LlmqatError, match=r"cannot use .*config\.json: .*; its model_type or architectures are unknown"
    ):
        build(architectures=architectures)


def test_scales_of_another_dtype(build):
    with pytest.raises(LlmqatError, match=rf"{UP}\.weight_scale is I16, and has to be one of F64, F32, F16, BF16"):
        build({f"{UP}.weight_scale": Header("I16", (80, 3))})


def test_codes_of_what_is_no_linear_layer(build):
    with pytest.raises(LlmqatError, match=rf"packs {NORM}, which is no linear layer; {APART}"):
        build({f"{NORM}.weight_packed": Header("I32", (6, 1)), f"{NORM}.weight_scale": Header("BF16", (6, 1))})


@pytest.mark.parametrize(
    ("name", "header", "message"),
    [
        (f"{UP}.weight_packed", Header("F32", (80, 6)), rf"{UP}\.weight_packed is F32 in the file, and has to be I32"),
        (f"{NORM}.weight", Header("I16", (48,)), rf"{NORM}\.weight is I16 in the file, and has to be BF16"),
        (
            f"{NORM}.weight",
            Header("BF16", (1, 48)),
            rf"size mismatch for {NORM}\.weight: \[1, 48\] in the file, \[48\]",
        ),
        (f"{NORM}.bias", Header("BF16", (48,)), rf"holds unknown tensors {NORM}\.bias"),
        (f"{NORM}.weight", None, rf"lacks {NORM}\.weight"),
        (f"{UP}.weight_scale", None, rf"lacks {UP}\.weight_scale"),
    ],
)
def test_tensors_of_another_model(build, name, header, message):
    with pytest.raises(LlmqatError, match=f"{message}.*; {APART}"):
        build({name: header})


def test_a_dtype_to_compute_in(build, packed):
    model = skeleton(packed[1], quantization_of(packed[1]), tensor_headers(packed[1]), torch.float64)
    assert model.get_submodule(NORM).weight.dtype == torch.float64
    assert model.get_submodule(UP).weight_scale.dtype == torch.bfloat16
