import json
import re
import shutil

import pytest
import torch
from transformers import AutoConfig

from llmqat.errors import LlmqatError
from llmqat.models import loading
from llmqat.models.loading import load_config, load_float, load_tokenizer, resolve_name


@pytest.fixture
def damaged(model_dir, tmp_path):
    """A copy of the tiny model to break."""
    return shutil.copytree(model_dir, tmp_path / "model")


def edit_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_loads_in_the_stored_or_the_asked_dtype(model_dir):
    model, stored = load_float(str(model_dir))
    assert stored == model.dtype == torch.bfloat16
    assert not model.training
    wide, stored = load_float(str(model_dir), torch.float32)
    assert stored == torch.bfloat16
    assert wide.dtype == torch.float32
    assert torch.equal(wide.lm_head.weight, model.lm_head.weight.float())


def test_float32_where_the_config_says_nothing(damaged):
    config = json.loads((damaged / "config.json").read_text())
    del config["dtype"]
    (damaged / "config.json").write_text(json.dumps(config))
    model, stored = load_float(str(damaged))
    assert stored == model.dtype == torch.float32


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
    with pytest.raises(
        LlmqatError, match=f"model directory {name} does not exist; give a directory, a Hub id, or llama"
    ):
        load_config(name)


def test_unreachable_hub(monkeypatch):
    def offline(name):
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


def test_messages_stay_short():
    assert loading._short(ValueError("a\n  b")) == "a b"
    assert loading._short(ValueError()) == "ValueError"
    assert len(loading._short(ValueError("x" * 500))) == 200
