from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel

from llmqat.errors import LlmqatError
from llmqat.models.patcher import float_parameters, prepare, quantized_layers
from llmqat.scheme import QuantScheme
from llmqat.train.codes import FirstCodes
from llmqat.train.loop import fit
from llmqat.train.modes import add_lora, freeze_scales, parameter_groups, select_trainable
from tests.quant.helpers import random_change


def trained_names(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def names_like(model, *endings):
    return {name for name, _ in model.named_parameters() if name.endswith(endings)}


def rate_of(model, mode, config):
    """Learning rate by parameter name."""
    rates = {id(p): group["lr"] for group in parameter_groups(model, mode, config) for p in group["params"]}
    return {name: rates[id(p)] for name, p in model.named_parameters() if id(p) in rates}


@pytest.mark.parametrize("symmetric", [True, False])
def test_full_trains_everything_but_zero_points(tiny_llama, symmetric):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32, symmetric))
    select_trainable(model, "full")
    frozen = names_like(model, "zero_point", "code_scale")
    assert trained_names(model) == {name for name, _ in model.named_parameters()} - frozen
    assert bool(names_like(model, "zero_point")) == (not symmetric)
    assert all(layer.code_scale is not None for _, layer, _ in quantized_layers(model))


def test_full_leaves_the_change_by_gptq_alone(tiny_llama):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 16))
    layers = [found.layer for found in quantized_layers(model)]
    for layer in layers:
        layer.compensation = random_change(*layer.weight.shape, 16, 0.02)
    for _ in range(2):  # the second time there are scales for the codes
        select_trainable(model, "full")
        assert not any(layer.code_scale.requires_grad for layer in layers)
    assert all(layer.weight.requires_grad for layer in layers)
    assert not any(p.requires_grad for layer in layers for p in layer.compensation)
    assert {id(p) for p in float_parameters(model)}.isdisjoint(id(p) for layer in layers for p in layer.compensation)


def test_full_without_scales(tiny_llama):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32))
    select_trainable(model, "full", scales=False)
    assert trained_names(model) == {name for name, _ in model.named_parameters()} - names_like(model, ".scale")
    assert all(layer.code_scale is None for _, layer, _ in quantized_layers(model))


def test_scales_trains_scales_and_norms(tiny_llama):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32, False))
    select_trainable(model, "scales", scales=False)
    assert trained_names(model) == names_like(model, ".scale", "norm.weight")
    assert len(names_like(model, "norm.weight")) == 5


def test_lora_trains_adapters_and_what_is_asked_for(tiny_llama):
    model = tiny_llama().bfloat16()
    prepare(model, QuantScheme(4, 32))
    model = add_lora(model, 3)
    assert isinstance(model, PeftModel)
    adapters = names_like(model, "lora_A.default.weight", "lora_B.default.weight")
    assert len(adapters) == 2 * 7 * 2
    for scales, norms in ((True, True), (True, False), (False, True), (False, False)):
        select_trainable(model, "lora", scales, norms)
        beside = [name for name, chosen in ((".scale", scales), ("norm.weight", norms)) if chosen]
        assert trained_names(model) == adapters | names_like(model, *beside)
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert all(p.shape[0] == 3 for name, p in model.named_parameters() if "lora_A" in name)


def test_what_trains_becomes_float32(tiny_llama):
    model = tiny_llama().bfloat16()
    prepare(model, QuantScheme(4, 32))
    select_trainable(model, "full")
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_add_lora_needs_a_prepared_model(tiny_llama):
    with pytest.raises(LlmqatError, match=r"no layer of this model is quantized; call llmqat\.prepare before add_lora"):
        add_lora(tiny_llama())


def test_lora_counts_in_codes_by_default(tiny_llama):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32))
    medians = sorted(float(layer.scale.detach().abs().median()) for _, layer, _ in quantized_layers(model))
    assert add_lora(model, 3).peft_config["default"].lora_alpha == pytest.approx(3 * (medians[6] + medians[7]) / 2)


def test_saved_adapter_is_loaded_again(tiny_llama, tmp_path):
    def prepared():
        model = tiny_llama()
        prepare(model, QuantScheme(4, 32))
        return model

    model = add_lora(prepared(), 3, alpha=0.1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    again = add_lora(prepared(), adapter=str(tmp_path))
    ids = torch.arange(10)[None]
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    assert not torch.equal(again(input_ids=ids).logits, prepared()(input_ids=ids).logits)
    assert trained_names(again) == trained_names(model)


def test_rates_are_relative(tiny_llama, train_config):
    """Ten times the weights, ten times the rates: training is then the same in units of codes."""
    rates = []
    for factor in (1, 8):
        model = tiny_llama()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter *= factor
        prepare(model, QuantScheme(4, 32))
        select_trainable(model, "full")
        rates.append(rate_of(model, "full", train_config("full", lr=0.02, lr_scale=1e-3, lr_float=1e-2)))
    small, large = rates
    assert large == {name: pytest.approx(8 * rate) for name, rate in small.items()}
    layer = model.model.layers[0].mlp.up_proj
    step = float(layer.scale.detach().abs().median())
    assert large["model.layers.0.mlp.up_proj.weight"] == pytest.approx(0.02 * step)
    assert large["model.layers.0.mlp.up_proj.scale"] == pytest.approx(1e-3 * step)
    assert large["model.norm.weight"] == pytest.approx(1e-2 * 8)
    embedding = model.model.embed_tokens.weight
    assert large["model.embed_tokens.weight"] == pytest.approx(1e-2 * float(embedding.detach().square().mean().sqrt()))


def test_rates_of_the_other_modes(tiny_llama, train_config):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32))
    select_trainable(model, "scales")
    rates = rate_of(model, "scales", train_config("scales", lr=0.1))
    layer = model.model.layers[1].self_attn.o_proj
    assert rates["model.layers.1.self_attn.o_proj.scale"] == pytest.approx(
        0.1 * float(layer.scale.detach().abs().median())
    )
    assert rates.keys() == trained_names(model)

    model = tiny_llama()
    prepare(model, QuantScheme(4, 32))
    model = add_lora(model, 2)
    adapters = trained_names(model)
    select_trainable(model, "lora")
    rates = rate_of(model, "lora", train_config("lora", lr=0.3, lr_scale=0.1, lr_float=0.2))
    assert rates.keys() == trained_names(model)
    assert {rates[name] for name in adapters} == {0.3}
    layer = "base_model.model.model.layers.1.self_attn.o_proj.base_layer"
    step = model.get_parameter(f"{layer}.scale").detach().abs().median()
    assert rates[f"{layer}.scale"] == pytest.approx(0.1 * float(step))
    assert {rates[name] for name in names_like(model, "norm.weight")} == {0.2}
    assert len(parameter_groups(model, "lora", train_config("lora"))) == 1 + len(rates) - len(adapters)
    freeze_scales(model)
    assert rate_of(model, "lora", train_config("lora")).keys() == adapters | names_like(model, "norm.weight")


@pytest.mark.parametrize(("mode", "moves"), [("full", True), ("lora", True), ("scales", False)])
def test_only_scales_mode_never_changes_a_code(prepared, train_config, mode, moves):
    run = prepared(mode)
    config = train_config(mode, max_steps=16, **({"lr": 0.02} if moves else {}))
    before = FirstCodes(run.model).packed
    scales = {name: layer.scale.detach().clone() for name, layer, _ in quantized_layers(run.model)}
    result = fit(run.model, run.data, config, teacher=run.teacher)
    after = FirstCodes(run.model).packed
    assert result.best_step > 0
    assert any(not torch.equal(before[name], after[name]) for name in before) == moves
    assert (result.codes_changed > 0) == moves
    assert not any(torch.equal(layer.scale, scales[name]) for name, layer, _ in quantized_layers(run.model))


def test_a_layer_without_adapter_is_an_error(tiny_moe, monkeypatch):
    model = tiny_moe("qwen3_moe")
    prepare(model, QuantScheme(4, 16))
    monkeypatch.setattr("llmqat.train.modes.reading_targets", lambda *_: nullcontext())
    with pytest.raises(LlmqatError, match=r"peft gave no adapter to 21 layers, .*down_proj; train with --train full"):
        add_lora(model, 4)
