"""Fused experts of families without a row: split where their layout is the usual one, else float and reported."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.experts import routers
from llmqat.models.patcher import prepare
from llmqat.nn.experts import SplitExperts
from llmqat.scheme import QuantScheme


def test_experts_that_cannot_be_split_stay_float_and_are_reported():
    config = CONFIG_MAPPING["gpt_oss"](
        hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, num_local_experts=4
    )
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(LlmqatError, match=r"only 78.* are model\.layers\.0\.mlp\.experts.*--min-coverage 0\.78"):
        prepare(model, QuantScheme(4, 16))
    report = prepare(model, QuantScheme(4, 16), min_coverage=0.78)
    skipped = {layer.name: layer.reason for layer in report.skipped}
    assert skipped["model.layers.0.mlp.experts.gate_up_proj"].startswith("fused experts of a layout")
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


@pytest.mark.parametrize(("model_type", "leaf"), [("olmoe", "gate_proj"), ("phimoe", "w1")])
def test_experts_without_a_row_are_split_and_named_as_transformers_does(model_type, leaf, tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    counts = {
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**sizes, **counts))
    report = prepare(model, QuantScheme(4, 16))
    assert len(report.quantized) == 4 + 3 * 4
    assert [name.endswith(("gate", "router")) for name in routers(model)] == [True]
    directory = save_packed(model.eval(), tmp_path)
    assert f"model.layers.0.mlp.experts.3.{leaf}.weight_packed" in load_file(directory / "model.safetensors")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        _, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(load_packed(directory)(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
