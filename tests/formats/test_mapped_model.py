"""A float model whose matrices stay in its files: the model that is loaded otherwise, or a line that says why not."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.errors import LlmqatError
from llmqat.formats.mapped_model import load_mapped
from llmqat.mapped import Disk, is_mapped
from llmqat.models.experts import split_experts
from llmqat.models.loading import load_float, storage_dtype_of

EXPERTS = ("mixtral", "gpt_oss")


@pytest.fixture
def saved(tiny, tiny_moe, tmp_path):
    """``saved(model_type)``: a float model on disk in shards of a few layers."""

    def make(model_type="llama"):
        model = tiny_moe(model_type) if model_type in EXPERTS else tiny(model_type)
        model.save_pretrained(tmp_path / model_type, max_shard_size="60KB")
        return tmp_path / model_type

    return make


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "opt", *EXPERTS])
def test_the_model_that_is_loaded_otherwise(saved, tmp_path, model_type):
    """Also with tied embeddings, Conv1D, and shards that split a block; with experts that files hold apart, under names
    of their own, or together, transposed and interleaved."""
    directory = saved(model_type)
    model, expected = load_mapped(str(directory), Disk(tmp_path)), load_float(str(directory), torch.float32)
    split_experts(expected)
    found, values = model.state_dict(), expected.state_dict()
    assert found.keys() == values.keys()
    assert all(torch.equal(found[key], value) for key, value in values.items())
    assert all(is_mapped(p) == (p.ndim == 2) and not p.requires_grad for p in model.parameters())
    ids = torch.arange(20).view(1, -1)
    assert torch.equal(model(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    assert (storage_dtype_of(model), model.training) == (torch.float32, False)


def test_lost_and_damaged_weights(saved, tmp_path):
    directory, name = saved(), "model.layers.1.mlp.up_proj.weight"
    index = directory / "model.safetensors.index.json"
    first = directory / json.loads(index.read_text())["weight_map"][name]
    tensors = load_file(first)
    weight = tensors.pop(name)
    save_file(tensors | {name: weight[:-1].contiguous()}, first)
    with pytest.raises(LlmqatError, match=rf"holds {name} as torch.float32 \[95, 64\], and the model wants \[96, 64\]"):
        load_mapped(str(directory), Disk(tmp_path))
    save_file(tensors, first)
    with pytest.raises(LlmqatError, match=rf"they lack {name}; copy or download it again"):
        load_mapped(str(directory), Disk(tmp_path))
    first.write_bytes(first.read_bytes()[:100])
    with pytest.raises(LlmqatError, match=rf"{first.name}.*copy or download the model again|{first.name} is damaged"):
        load_mapped(str(directory), Disk(tmp_path))


def test_weights_that_transformers_converts(saved, tmp_path, monkeypatch):
    """One that keeps its shape, as Inkling 2 has its experts interleaved."""
    convert = lambda *_, **__: {"lm_head.weight": ("lm_head.weight", True)}  # noqa: E731
    monkeypatch.setattr("llmqat.formats.mapped_model.names_in_model", convert)
    with pytest.raises(LlmqatError, match=r"holds lm_head.weight as .*, and transformers converts it: it cannot be"):
        load_mapped(str(saved()), Disk(tmp_path))


def test_weights_of_another_format(saved, tmp_path):
    directory = saved()
    for path in directory.glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))
    with pytest.raises(LlmqatError, match=r"has no safetensors, .* write it again with save_pretrained"):
        load_mapped(str(directory), Disk(tmp_path))
