import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, ViTConfig

from llmqat.errors import LlmqatError
from llmqat.models.loading import (
    empty_model,
    load_as_stored,
    load_config,
    load_empty,
    load_float,
    load_tokenizer,
    resolve_name,
    storage_dtype_of,
)


@pytest.fixture
def damaged(model_dir, tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(model_dir, tmp_path / "model")


def edit_config(folder, **values):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_loads_in_the_stored_or_the_asked_dtype(model_dir):
    model = load_float(str(model_dir))
    assert storage_dtype_of(model) == model.dtype == torch.bfloat16
    assert not model.training
    wide = load_float(str(model_dir), torch.float32)
    assert storage_dtype_of(wide) == storage_dtype_of(copy.deepcopy(wide)) == torch.bfloat16
    assert wide.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())


def mapped(tensor):
    """Whether a tensor lies in a memory-mapped file of weights."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if "model.safetensors" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    return any(start <= tensor.data_ptr() < end for start, end in ranges)


def test_as_stored_is_in_the_file_and_exact(model_dir):
    model = load_as_stored(str(model_dir))
    assert storage_dtype_of(model) == model.dtype == torch.bfloat16
    assert all(mapped(parameter) for parameter in model.to("cpu").parameters())
    assert not mapped(load_float(str(model_dir), torch.float32).lm_head.weight)


@pytest.mark.parametrize("stored", ["mixed", "float32", "float64"])
def test_numbers_that_need_more_bits_are_float32(damaged, stored):
    tensors = load_file(damaged / "model.safetensors")
    for name, tensor in tensors.items():
        if stored != "mixed" or tensor.ndim == 1:
            tensors[name] = tensor.to(torch.float64 if stored == "float64" else torch.float32) + 2.0**-20
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    model = load_as_stored(str(damaged))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"].float())
    assert storage_dtype_of(model) == {"mixed": torch.bfloat16}.get(stored) or getattr(torch, stored)


def test_what_no_file_holds_is_not_rounded(tiny, tmp_path):
    """Gemma 3 multiplies embeddings by the root of its width."""
    tiny("gemma3_text", hidden_size=80).bfloat16().save_pretrained(tmp_path)
    factor = load_as_stored(str(tmp_path)).model.embed_tokens.embed_scale
    assert torch.equal(factor, load_float(str(tmp_path), torch.float32).model.embed_tokens.embed_scale)
    assert factor.bfloat16() != factor


def test_a_model_of_ones_own_is_stored_as_it_is(tiny_llama):
    assert storage_dtype_of(tiny_llama().bfloat16()) == torch.bfloat16


@pytest.mark.parametrize("said", [..., "float32"], ids=["missing", "wrong"])
def test_the_tensors_say_what_is_stored(damaged, said):
    """A config without a dtype, or with a wrong one, is no reason to write a file twice as large."""
    edit_config(damaged, dtype=said)
    assert storage_dtype_of(load_float(str(damaged), torch.float32)) == torch.bfloat16
    assert load_float(str(damaged)).dtype == torch.bfloat16
    assert load_empty(str(damaged))[1] == torch.bfloat16


def test_most_of_mixed_dtypes(damaged):
    """Norms in float32 beside matrices in bfloat16."""
    tensors = load_file(damaged / "model.safetensors")
    tensors = {name: tensor.float() if tensor.ndim == 1 else tensor for name, tensor in tensors.items()}
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    edit_config(damaged, dtype=...)
    assert storage_dtype_of(load_float(str(damaged))) == torch.bfloat16


def test_the_dtype_of_pickled_weights(damaged):
    torch.save(load_file(damaged / "model.safetensors"), damaged / "pytorch_model.bin")
    (damaged / "model.safetensors").unlink()
    edit_config(damaged, dtype=...)
    assert storage_dtype_of(load_float(str(damaged), torch.float32)) == torch.bfloat16


def test_the_dtype_of_shards(damaged, model_dir):
    load_float(str(model_dir)).save_pretrained(damaged, max_shard_size="20KB")
    (damaged / "model.safetensors").unlink(missing_ok=True)
    edit_config(damaged, dtype=...)
    assert len(list(damaged.glob("model-*.safetensors"))) > 1
    assert storage_dtype_of(load_float(str(damaged), torch.float32)) == torch.bfloat16


def test_numbers_of_eight_bits_without_a_quantization(damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LlmqatError, match=r"most weights of .* are stored as F8_E4M3, and config\.json has no quant"):
        load_float(str(damaged))


@pytest.mark.parametrize("read", [load_config, load_float, load_tokenizer], ids=lambda read: read.__name__)
def test_code_of_a_model_never_runs(damaged, tmp_path, read, monkeypatch):
    """And nobody is asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    (damaged / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    edit_config(damaged, model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    tokenizer = json.loads((damaged / "tokenizer_config.json").read_text())
    tokenizer |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    (damaged / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    with pytest.raises(LlmqatError, match=r"comes with Python code of its own \(auto_map\), which llmqat never runs"):
        read(str(damaged))
    assert not (tmp_path / "ran").exists()


def separate_head(folder, model_dir, flag):
    """The model with a head of its own, and a config that says `flag`."""
    model = load_float(str(model_dir))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight + 1)
    model.config.tie_word_embeddings = False
    model.save_pretrained(folder)
    edit_config(folder, tie_word_embeddings=flag)
    return model


@pytest.mark.parametrize("flag", [True, False])
def test_a_head_of_its_own_stays_one(damaged, model_dir, flag):
    """Also when something ties the weights of the model again."""
    expected = separate_head(damaged, model_dir, flag).lm_head.weight
    for model in (load_float(str(damaged)), load_empty(str(damaged))[0]):
        model.tie_weights()
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert model.config.tie_word_embeddings is False
    model = load_float(str(damaged))
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, expected)


def test_a_tied_head_that_is_stored_twice_stays_tied(damaged, tied_dir):
    model = load_float(str(tied_dir))
    tensors = load_file(tied_dir / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    shutil.copy(tied_dir / "config.json", damaged)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    for loaded in (model, load_float(str(damaged)), load_empty(str(damaged))[0]):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert loaded.config.tie_word_embeddings is True


def test_tokenizer(model_dir, tokenizer):
    assert load_tokenizer(str(model_dir))("def x")["input_ids"] == tokenizer("def x")["input_ids"]


def test_aliases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundled = resolve_name("llama")
    assert bundled.endswith("models/bundled/llama")
    assert resolve_name("org/llama") == "org/llama"
    (tmp_path / "llama").mkdir()
    assert resolve_name("llama") == "llama"  # a directory of that name is what the user means


@pytest.mark.parametrize("name", ["./none", "/none/at/all"])
def test_missing_directory(name):
    message = f"model directory {name} does not exist; give a directory, a GGUF file, a Hub id, or llama, smollm2"
    with pytest.raises(LlmqatError, match=message):
        load_config(name)


def test_unreachable_hub(monkeypatch):
    def offline(name, **options):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nlong story")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    message = "cannot load model org/name: not a model directory, and not reachable on the Hub; without a network, give"
    with pytest.raises(LlmqatError, match=message):
        load_config("org/name")


def test_unknown_family(damaged):
    edit_config(damaged, model_type="foo")
    with pytest.raises(LlmqatError, match=r"cannot use model .*: .*`foo`"):
        load_float(str(damaged))


def test_quantized_already(damaged):
    edit_config(damaged, quantization_config={"quant_method": "compressed-tensors", "format": "pack-quantized"})
    with pytest.raises(LlmqatError, match="is quantized already; start from the float model it was made of"):
        load_config(str(damaged))


@pytest.mark.parametrize("keep", [0, 100, 50_000], ids=["empty", "header", "body"])
def test_truncated_weights(damaged, keep):
    path = damaged / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(LlmqatError, match=r"cannot load the weights of .*; copy or download the model again") as caught:
        load_float(str(damaged))
    assert "\n" not in str(caught.value)


def test_missing_weights(damaged):
    (damaged / "model.safetensors").unlink()
    with pytest.raises(LlmqatError, match=f"cannot load the weights of {re.escape(str(damaged))}"):
        load_float(str(damaged))


@pytest.mark.parametrize("content", ["", "{", "[]"], ids=["empty", "truncated", "list"])
def test_damaged_config(damaged, content):
    (damaged / "config.json").write_text(content)
    with pytest.raises(LlmqatError, match=r"cannot (load|use) model"):
        load_config(str(damaged))


def test_weights_of_another_config(damaged):
    """transformers fills what is missing with random numbers; a run on those would be worse than none."""
    edit_config(damaged, num_hidden_layers=3)
    with pytest.raises(LlmqatError, match=r"cannot load the weights of .*layers\.2"):
        load_float(str(damaged))


def test_no_tokenizer(damaged):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(LlmqatError, match="has no tokenizer that transformers can load: "):
        load_tokenizer(str(damaged))


def test_a_model_of_another_kind_is_refused_in_one_line(monkeypatch):
    with pytest.raises(LlmqatError, match="transformers loads no causal language model of model type 'vit'; choose"):
        empty_model(ViTConfig())
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_config", lambda *_, **__: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        empty_model(ViTConfig())
