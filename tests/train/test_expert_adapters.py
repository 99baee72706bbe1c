"""Adapters of experts in files: peft's own, for a model that is not split, and back again."""

import json
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from llmqat.errors import LlmqatError
from llmqat.models.experts import experts_as_linears
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.scheme import QuantScheme
from llmqat.train.expert_adapters import CONFIG, WEIGHTS
from llmqat.train.modes import add_lora

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
# Families that peft rewrites, one of them with an MLP beside experts that it would take for one; transposed experts
# with gate and up in turn; transposed ones that do not say so; no gate.
FAMILIES = {
    "mixtral": {},
    "qwen3_moe": {"mlp_only_layers": [1]},
    "gpt_oss": {"layer_types": ["full_attention"] * 2},
    "llama4_text": {"intermediate_size_mlp": 32},
    "nemotron_h": {
        "n_routed_experts": 4,
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 16,
    },
}
OTHERS = {
    "mamba2": {"num_heads": 8, "n_groups": 2, "state_size": 8},
    "laguna": {"layer_types": ["full_attention"] * 2, "mlp_layer_types": ["dense", "sparse"]},
}


def tiny(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**SIZES | (FAMILIES | OTHERS)[family]))


def adapted(family, overrides=None):
    """A prepared model with adapters that are not zero."""
    model = tiny(family)
    prepare(model, QuantScheme(4, 16), overrides=overrides, min_coverage=0.5)
    model = add_lora(model, 3, alpha=2.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert all(on_grid.adapters is not None for on_grid in quantized_layers(model))
    return model


def latents(model):
    layers = {name: layer.latent(adapters) for name, layer, adapters in quantized_layers(model)}
    return {name: torch.cat([latent.rows(rows) for rows in latent.chunks()]) for name, latent in layers.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_peft_has_the_latents_of_the_float_model(family, tmp_path):
    model = adapted(family)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("ignore", "The following (rank|alpha)_pattern keys did not match")  # Parameters did
        plain = PeftModel.from_pretrained(tiny(family), tmp_path)
    merged = plain.merge_and_unload()
    with experts_as_linears(merged), torch.no_grad():
        for name, latent in latents(model).items():
            torch.testing.assert_close(merged.get_submodule(name).weight, latent, rtol=1e-5, atol=1e-5, msg=name)
    again, resumed = tiny(family), adapted(family)
    prepare(again, QuantScheme(4, 16))
    resumed.load_adapter(tmp_path, "default", is_trainable=True)
    for loaded in (add_lora(again, adapter=str(tmp_path)), resumed):
        found = latents(loaded)
        assert all(torch.equal(found[name], latent) for name, latent in latents(model).items())


def test_experts_that_are_float_have_no_adapters(tmp_path):
    model = adapted("mixtral", overrides={"layers.0.*experts": "float"})
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    names = [f"model.layers.1.mlp.experts.{name}" for name in ("down_proj", "gate_up_proj")]
    assert config["target_parameters"] == names
    assert (config["r"], config["rank_pattern"]) == (3, {"experts.gate_up_proj": 6})
    assert config["alpha_pattern"] == {"experts.gate_up_proj": 4.0}


def test_adapters_that_no_expert_has_alone(tmp_path):
    """Those that peft trained give gate and up the same A, of any rank."""
    adapted("mixtral").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    place = "base_model.model.model.layers.0.mlp.experts.base_layer"
    dense = tensors | {f"{place}.lora_B.weight": torch.ones_like(tensors[f"{place}.lora_B.weight"])}
    odd = tensors | {f"{place}.lora_A.weight": torch.ones(20, 32), f"{place}.lora_B.weight": torch.ones(64, 20)}
    for changed, rank in ((dense, 24), (odd, 20)):
        save_file(changed, tmp_path / WEIGHTS)
        model = tiny("mixtral")
        prepare(model, QuantScheme(4, 16))
        shapes = (
            rf"factors \[{rank}, 32\] and \[64, {rank}\], which are not those of 4 experts .* of gate_proj, up_proj;"
        )
        with pytest.raises(LlmqatError, match=shapes):
            add_lora(model, adapter=str(tmp_path))


def test_adapters_of_another_model(tmp_path):
    adapted("mixtral").save_pretrained(tmp_path)
    model = tiny("gpt_oss")
    prepare(model, QuantScheme(4, 16))
    (tmp_path / CONFIG).write_text((tmp_path / CONFIG).read_text().replace("mlp.experts.", "ffn.experts."))
    with pytest.raises(
        LlmqatError, match=r"for experts in model.layers.0.ffn.experts.down_proj, which this model does"
    ):
        add_lora(model, adapter=str(tmp_path))


def test_state_space_layers_have_adapters():
    """peft refuses their projections; a prepared model reads no weight past them."""
    adapted("mamba2")


def test_what_peft_alone_would_not_find_is_said(tmp_path, capsys):
    """Files of Laguna call the shared expert otherwise, and peft renames adapters that are called right already."""
    model = adapted("laguna")
    model.save_pretrained(tmp_path)
    said = f"peft alone does not find the adapters of 3 layers in {tmp_path / WEIGHTS}, which it renames, the first is"
    assert said in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"missing adapter keys .*shared_experts.down_proj"):
        PeftModel.from_pretrained(tiny("laguna"), tmp_path)
