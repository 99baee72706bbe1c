"""A GGUF file holds the packed model: read back by transformers, which shares no code with us, bit for bit."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGUFReader, get_tensor_name_map, quants
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf import FILE, float_entry
from llmqat.formats.reader import load_packed
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline.export import export
from llmqat.scheme import QuantScheme

W4 = QuantScheme(4, 32, scale_dtype="float16")
# What transformers does not read from the file, as it is by default; and what llama.cpp takes for granted.
USUAL = {
    "qwen3": {"head_dim": 128},
    "gemma2": {"head_dim": 256},
    "gemma3_text": {"head_dim": 256, "layer_types": ["sliding_attention"] * 2},
}


@pytest.fixture
def exported(packed_dir, merging_tokenizer, tmp_path):
    """``exported(scheme, model)``: a packed directory and its export."""

    def make(scheme, model, dtype=torch.float32, **options):
        source = packed_dir(scheme, dtype, model, merging_tokenizer, **options)
        export(source, "gguf", tmp_path / "out")
        return source, tmp_path / "out"

    return make


def same_numbers(source, out):
    """Weights of the float32 model that transformers reads from the file, and its logits, are the packed model's."""
    packed, theirs = load_packed(source), AutoModelForCausalLM.from_pretrained(out, gguf_file=FILE, dtype=torch.float32)
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            assert torch.equal(theirs.get_submodule(name).weight, module.rows(torch.arange(module.out_features))), name
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, packed(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"])
def test_families(exported, tiny, model_type):
    model = tiny(model_type, vocab_size=264, **USUAL.get(model_type, {}))
    same_numbers(*exported(W4, model))


@pytest.mark.parametrize("scheme", [W4, QuantScheme(4, 32, False, scale_dtype="float16")], ids=str)
def test_gemma_1(exported, tiny, scheme):
    """transformers reads no GGUF file of it: every tensor, decoded by the gguf package."""
    source, out = exported(scheme, tiny("gemma", vocab_size=264))
    reader, packed = GGUFReader(out / FILE), load_packed(source)
    assert reader.fields["general.architecture"].contents() == "gemma"
    names, found = get_tensor_name_map(MODEL_ARCH.GEMMA, 2), {tensor.name: tensor for tensor in reader.tensors}
    for name, module in packed.named_modules():
        if isinstance(module, PackedLinear):
            right = module.rows(torch.arange(module.out_features))
        elif "norm" in name:  # llama.cpp multiplies by what Gemma adds 1 to
            right = module.weight + 1
        elif name == "model.embed_tokens":
            right = module.weight
        else:
            continue
        tensor = found.pop(f"{names.get_name(name)}.weight")
        decoded = tensor.data if tensor.data.dtype == np.float32 else quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(decoded, right.detach().numpy()), name
    assert not found, "the head is the embedding"


@pytest.mark.parametrize("scheme", [QuantScheme(8, -1), QuantScheme(4, 32, False)], ids=str)
def test_schemes(exported, tiny, scheme):
    same_numbers(*exported(replace(scheme, scale_dtype="float16"), tiny("llama", vocab_size=264)))


def test_a_head_tied_to_the_embedding(exported, tiny):
    source, out = exported(W4, tiny("llama", vocab_size=264, tie_word_embeddings=True), lm_head_bits=8)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(out / FILE).tensors}
    assert kinds["token_embd.weight"] == "Q8_0"
    assert "output.weight" not in kinds
    same_numbers(source, out)


def test_rotary_scaling_of_llama_3(exported, tiny):
    rope = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    source, out = exported(W4, tiny("llama", vocab_size=264, rope_parameters=rope))
    (divisors,) = (tensor.data for tensor in GGUFReader(out / FILE).tensors if tensor.name == "rope_freqs.weight")
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    np.testing.assert_allclose(plain / divisors, load_packed(source).model.rotary_emb.inv_freq, rtol=1e-6)
    assert divisors.min() == 1
    assert divisors.max() == 8


def test_what_the_file_says(exported, tiny):
    _, out = exported(W4, tiny("mistral", vocab_size=264, sliding_window=32), torch.bfloat16)
    reader = GGUFReader(out / FILE)
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == "llama"
    assert value["llama.context_length"] == 32  # beyond the window llama.cpp would attend to more
    assert value["llama.rope.dimension_count"] == value["llama.attention.key_length"] == 16
    assert value["general.file_type"] == 2
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == "Q4_0"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "BF16"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    assert value["tokenizer.chat_template"] == "{{ messages }}"
    tokenizer = AutoTokenizer.from_pretrained(out, gguf_file=FILE)
    assert tokenizer("def x")["input_ids"][-3:] == [259, *tokenizer.convert_tokens_to_ids(["Ġ", "x"])]


def test_other_dtypes_and_grids_are_refused(exported, tiny):
    with pytest.raises(LlmqatError, match=r"output\.weight is float64, and llama\.cpp computes in F32, F16, BF16; exp"):
        float_entry("output.weight", torch.zeros(2, 2, dtype=torch.float64), 0)
    with pytest.raises(LlmqatError, match=r"gguf cannot hold .* W4A16 g16 symmetric; train with --bits 4 --group-size"):
        exported(QuantScheme(4, 16), tiny("llama", vocab_size=264))


def test_without_the_package(exported, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LlmqatError, match="the package gguf, which reads and writes GGUF files, is not installed: pip"):
        exported(W4, tiny("llama", vocab_size=264))
