"""Fused experts of families without a row: split where a trial proves their layout, else float and reported."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import readers, transformers_route
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.experts import experts_in_words, routers
from llmqat.models.patcher import prepare
from llmqat.nn.experts import SplitExperts
from llmqat.pipeline.export import export
from llmqat.scheme import QuantScheme


def gpt_oss():
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = CONFIG_MAPPING["gpt_oss"](
        **sizes, num_hidden_layers=1, vocab_size=64, num_local_experts=4, num_experts_per_tok=2
    )
    return AutoModelForCausalLM.from_config(config).eval()


def test_experts_that_cannot_be_split_stay_float_and_are_reported(monkeypatch):
    monkeypatch.setattr("llmqat.models.experts.layout_of", lambda _: None)
    model = gpt_oss()
    with pytest.raises(LlmqatError, match=r"only 65.* are model\.layers\.0\.mlp\.experts.*--min-coverage 0\.65"):
        prepare(model, QuantScheme(4, 16))
    report = prepare(model, QuantScheme(4, 16), min_coverage=0.65)
    skipped = {layer.name: layer.reason for layer in report.skipped}
    assert skipped["model.layers.0.mlp.experts.gate_up_proj"].startswith("fused experts of a layout")
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_experts_that_files_hold_together_are_exported_together(tmp_path):
    """Transposed, interleaved and with biases again, as transformers reads them; packed ones it does not."""
    model = gpt_oss()
    for bias in (p for name, p in model.named_parameters() if name.endswith("bias")):
        torch.nn.init.normal_(bias)
    words = "transposed, interleaved, with biases, with a gate of their own"
    assert experts_in_words(model) == f"4 experts in each of 1 layers ({words}), confirmed by a trial"
    report = prepare(model, QuantScheme(4, 16))
    assert readers(report) == (
        "llmqat reads it; transformers reads experts of this family as float alone: llmqat export --to dense"
    )
    assert transformers_route(report) is None
    packed = save_packed(model, tmp_path / "packed")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight_packed" in load_file(packed / "model.safetensors")
    theirs, info = AutoModelForCausalLM.from_pretrained(
        export(packed, "dense", tmp_path / "dense").output, output_loading_info=True
    )
    assert not any(info.values())
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)


def test_experts_without_a_row_are_split_and_named_as_transformers_does(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4}
    counts = {
        "num_hidden_layers": 1,
        "vocab_size": 64,
        "num_experts": 4,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    }
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["phimoe"](**sizes, **counts))
    report = prepare(model, QuantScheme(4, 16))
    assert len(report.quantized) == 4 + 3 * 4
    assert [name.endswith(("gate", "router")) for name in routers(model)] == [True]
    directory = save_packed(model.eval(), tmp_path)
    assert "model.layers.0.mlp.experts.3.w1.weight_packed" in load_file(directory / "model.safetensors")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        _, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"]
        torch.testing.assert_close(load_packed(directory)(ids).logits, model(ids).logits, rtol=1e-3, atol=1e-3)
