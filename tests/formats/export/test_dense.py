"""The dequantized model is what was trained, for whoever reads float checkpoints."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats.export import directory as writing
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.pipeline.export import export
from llmqat.scheme import QuantScheme


def test_weights_are_those_of_the_packed_file(trained, decode, tmp_path, scheme):
    source = save_packed(trained(scheme, torch.bfloat16), tmp_path / "packed")
    export(source, "dense", tmp_path / "out")
    dense = load_file(tmp_path / "out" / "model.safetensors")
    for name, (_, _, _, w_hat) in decode(source, scheme.bits, scheme.symmetric).items():
        assert torch.equal(dense.pop(f"{name}.weight"), w_hat), name
    packed = load_file(source / "model.safetensors")
    assert all(torch.equal(tensor, packed[name]) for name, tensor in dense.items())


@pytest.mark.parametrize("model_type", ["gpt2", "gemma3_text", "qwen2"])
def test_transformers_loads_it(tiny, packed_dir, tmp_path, model_type):
    """Other layouts, biases and ties; the float32 model computes what the packed one does."""
    source = packed_dir(QuantScheme(4, 16), torch.float32, tiny(model_type), min_coverage=0.0)
    export(source, "dense", tmp_path / "out")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load_packed(source)(ids).logits, rtol=1e-4, atol=1e-4)


def test_experts(tiny_moe, packed_dir, tmp_path):
    source = packed_dir(QuantScheme(4, 16), torch.float32, tiny_moe("mixtral"))
    export(source, "dense", tmp_path / "out")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load_packed(source)(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_head_tied_to_the_embedding(tiny_llama, packed_dir, tmp_path):
    source = packed_dir(QuantScheme(4, 16), torch.float32, tiny_llama(tie_word_embeddings=True), lm_head_bits=8)
    export(source, "dense", tmp_path / "out")
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, load_packed(source)(ids).logits, rtol=1e-4, atol=1e-4)


def test_shards(packed_dir, tmp_path, monkeypatch):
    source = packed_dir(QuantScheme(4, 16))
    export(source, "dense", tmp_path / "one")
    monkeypatch.setattr(writing, "SHARD_BYTES", 50_000)
    export(source, "dense", tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    assert shards[0].name == f"model-00001-of-{len(shards):05}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    together = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    expected = load_file(tmp_path / "one" / "model.safetensors")
    assert index["weight_map"].keys() == together.keys() == expected.keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)


def test_what_lies_beside_the_weights(packed_dir, tokenizer, tmp_path):
    scheme = QuantScheme(4, 16, act_bits=8)
    source = packed_dir(scheme, tokenizer=tokenizer, kv_bits=8)
    done = export(source, "dense", tmp_path / "out")
    assert [note.split(",")[0] for note in done.notes] == [
        "trained with int8 activations",
        "trained with an int8 cache",
    ]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "llmqat"} & config.keys()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert "14 layers moved bit for bit" in str(done)


def test_a_float_model_has_no_codes(model_dir, tmp_path):
    with pytest.raises(LlmqatError, match="holds no packed model, and only one has codes to export; give the"):
        export(model_dir, "dense", tmp_path / "out")
    assert not (tmp_path / "out").exists()
