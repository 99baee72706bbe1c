import re

import pytest

from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import config_of, schemes_of
from llmqat.scheme import QuantScheme

INT4 = QuantScheme(4, 128)


def weights(**changes):
    args = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False}
    return args | changes


def acts(**changes):
    return {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True} | changes


def config(group=None, **changes):
    """The config of a foreign writer, with a change."""
    group = {"targets": ["Linear"], "weights": weights(), "input_activations": None} | (group or {})
    top = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": group}}
    return top | changes


def test_config_is_the_minimal_one_that_loads():
    """formats.md, section 1.2, to the letter."""
    assert config_of({"a": INT4, "b": INT4}, ["lm_head"]) == {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "format": "pack-quantized",
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "symmetric": True,
                    "strategy": "group",
                    "group_size": 128,
                    "dynamic": False,
                },
                "input_activations": None,
                "output_activations": None,
            }
        },
    }


def test_config_of_channels_zero_points_and_activations():
    group = config_of({"a": QuantScheme(8, -1, False, 8)}, [])["config_groups"]["group_0"]
    assert group["weights"] == weights(num_bits=8, symmetric=False, strategy="channel", group_size=None)
    assert group["input_activations"] == acts()
    static = config_of({"a": QuantScheme(8, -1, act_bits=8, act_static=True)}, [])["config_groups"]["group_0"]
    assert static["input_activations"] == acts(strategy="tensor", dynamic=False)


ASYM = QuantScheme(4, 128, False)


@pytest.mark.parametrize(
    ("schemes", "embeddings", "asks"),
    [
        ({"a": ASYM, "b": ASYM}, (), True),
        ({"a": INT4, "b": INT4}, ("b",), True),
        ({"a": INT4, "b": INT4}, (), False),
        ({"a": ASYM, "b": QuantScheme(8, 128, False)}, (), False),
        ({"a": QuantScheme(4, 128, False, 8)}, (), False),
        ({"mlp.experts.0.up_proj": ASYM}, (), False),
        ({"mlp.experts.0.up_proj": INT4, "b": INT4}, ("b",), True),
    ],
)
def test_it_asks_to_be_dequantized_where_that_is_right(schemes, embeddings, asks):
    """Which decodes all layers as the first group says, drops activations, and knows no zero points of experts."""
    config = config_of(schemes, [], embeddings)
    assert config.get("dequantize", False) == asks
    assert schemes_of(config, list(schemes)) == schemes, "and llmqat does not ask"


def test_experts_get_one_pattern():
    """By which transformers finds the group of the experts; layers that are no expert's are named beside it."""
    int8 = QuantScheme(8, 128)
    schemes = {f"layers.1.mlp.experts.{e}.up_proj": INT4 for e in range(12)} | {"q_proj": INT4, "o_proj": int8}
    config = config_of(schemes, [])
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [[r"re:layers\.1\.mlp\.experts\.\d+\.up_proj$", "q_proj"], ["o_proj"]]
    assert schemes_of(config, list(schemes)) == schemes


def test_several_schemes_name_their_layers():
    int8 = QuantScheme(8, -1)
    groups = config_of({"a": INT4, "b": int8, "c": INT4}, [])["config_groups"]
    assert [group["targets"] for group in groups.values()] == [["a", "c"], ["b"]]
    assert [group["weights"]["num_bits"] for group in groups.values()] == [4, 8]


@pytest.mark.parametrize("act_bits", [None, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
def test_round_trip(bits, symmetric, group_size, act_bits):
    first, second = QuantScheme(bits, group_size, symmetric, act_bits), QuantScheme(4, 64)
    for schemes in ({"a": first, "b": first}, {"a": first, "b": second, "c": first}):
        assert schemes_of(config_of(schemes, ["lm_head"]), list(schemes)) == schemes


def test_targets_of_other_writers():
    targets = config({"targets": [r"re:.*layers\.\d+\.mlp\..*"]})
    assert schemes_of(targets, ["model.layers.10.mlp.up_proj"]) == {"model.layers.10.mlp.up_proj": INT4}
    with pytest.raises(
        LlmqatError, match=r"layer model\.norm is packed but no config group targets it; config\.json and"
    ):
        schemes_of(targets, ["model.norm"])
    assert schemes_of(config({"targets": ["x.y"]}), ["x.y"]) == {"x.y": INT4}
    with pytest.raises(LlmqatError, match="layer x is packed but no config group targets it"):
        schemes_of(config({"targets": ["x.y"]}), ["x"])


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (config(quant_method="gptq"), "quantization 'gptq' in format 'pack-quantized' is not compressed-tensors"),
        (
            config(format="int-quantized"),
            "in format 'int-quantized' is not compressed-tensors pack-quantized; load this",
        ),
        ({}, "quantization None in format None is not compressed-tensors pack-quantized"),
        (config({"weights": weights(type="float")}), "cannot run float weights of strategy 'group'; llmqat reads int"),
        (config({"weights": weights(strategy="block")}), "cannot run int weights of strategy 'block'"),
        (config({"weights": weights(num_bits=5)}), "bits must be one of 2, 3, 4, 8, got 5"),
        (
            config({"input_activations": acts(strategy="tensor")}),
            "cannot run these activations; llmqat reads symmetric",
        ),
        (config({"input_activations": acts(dynamic=False)}), "cannot run these activations"),
        (config({"input_activations": acts(symmetric=False)}), "cannot run these activations"),
        (config({"input_activations": acts(num_bits=4)}), "act_bits must be 8"),
        (config({"input_activations": acts(type="float")}), "cannot run these activations"),
    ],
)
def test_what_llmqat_cannot_run(bad, message):
    with pytest.raises(LlmqatError, match=re.escape(message)):
        schemes_of(bad, ["x"])
