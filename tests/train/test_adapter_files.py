import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from llmqat.errors import LlmqatError
from llmqat.models.patcher import prepare, quantized_layers, transformers_model
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.scheme import QuantScheme
from llmqat.train.adapter_files import BESIDE
from llmqat.train.modes import add_lora, select_trainable

IDS = torch.arange(10)[None]


@pytest.fixture
def prepared(tiny_llama):
    def make(group_size=32):
        model = tiny_llama(num_hidden_layers=1)
        prepare(model, QuantScheme(4, group_size))
        return model

    return make


def trained(model, **choices):
    """As if trained: adapters, and what trains beside them, have moved."""
    model = add_lora(model, 3)
    select_trainable(model, "lora", **choices)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * (1.0 if "lora_B" in name else 0.1 * parameter.abs().max())
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("scales", [True, False])
def test_scales_and_norms_are_saved_beside_adapters_and_loaded_again(prepared, tmp_path, scales):
    model = trained(prepared(), scales=scales)
    model.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / BESIDE))
    assert {name for name in names if name.endswith("scale")} == {
        f"{layer.name}.scale" for layer in quantized_layers(model) if scales
    }
    assert sum(name.endswith("norm.weight") for name in names) == 3
    assert not any("norm" in name or "scale" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    again = add_lora(prepared(), adapter=str(tmp_path))
    assert torch.equal(logits(again), logits(model))
    resumed = trained(prepared(), scales=scales)  # as a Trainer resumes
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    assert torch.equal(logits(resumed), logits(model))
    again.save_pretrained(tmp_path / "again")
    assert set(load_file(tmp_path / "again" / BESIDE)) == names
    (tmp_path / BESIDE).unlink()
    assert not torch.equal(logits(add_lora(prepared(), adapter=str(tmp_path))), logits(model))


def test_a_norm_that_layers_share_is_saved(prepared, tmp_path):
    model = prepared()
    model.model.layers[0].input_layernorm.weight = model.model.norm.weight
    trained(model).save_pretrained(tmp_path)
    saved = load_file(tmp_path / BESIDE)
    assert torch.equal(saved["model.norm.weight"], saved["model.layers.0.input_layernorm.weight"])


def test_merging_keeps_scales_and_norms(prepared):
    model = trained(prepared())
    expected = logits(model)
    merged = model.merge_and_unload()
    assert not isinstance(merged, PeftModel)
    assert not any(isinstance(module, LoraFakeQuantLinear) for module in transformers_model(merged).modules())
    assert torch.equal(logits(merged), expected)


def test_another_grid_is_refused(prepared, tmp_path):
    trained(prepared()).save_pretrained(tmp_path)
    message = "holds model.layers.0.mlp.down_proj.scale of shape (64, 3), and the model has (64, 6); prepare it with"
    with pytest.raises(LlmqatError, match=re.escape(message)):
        add_lora(prepared(16), adapter=str(tmp_path))
