import pytest
import torch

from llmqat.algorithms.activation_ranges import follow_activations, observe_activations, static_layers
from llmqat.algorithms.smoothquant import observe_readers
from llmqat.errors import LlmqatError
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme

STATIC = QuantScheme(8, 16, act_bits=8, act_static=True)


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[0]).logits


def test_ranges_are_those_of_the_float_model(tiny_llama, tokens):
    plain, model = tiny_llama(), tiny_llama().train()
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    expected = observe_readers(plain, [plain.get_submodule(name) for name in names], tokens, 0)
    prepare(model, STATIC)
    observe_activations(model, tokens, "minmax")
    assert model.training
    assert all(layer.enabled and layer.training for layer in static_layers(model))
    for name, inputs in zip(names, expected, strict=True):
        assert model.get_submodule(name).act_scale == pytest.approx(float(inputs.absmax.max() / 127))
    before = [layer.act_scale.clone() for layer in static_layers(model)]
    observe_activations(model, tokens)
    assert before == [layer.act_scale for layer in static_layers(model)], "the same data moves no maximum"
    observe_activations(model, [], "percentile")
    assert not any(layer.act_scale.any() for layer in static_layers(model)), "a new observer starts anew"


@pytest.mark.parametrize("init", ["rtn", "gptq"])
def test_prepare_calibrates_and_static_costs_little(tiny_llama, tokens, init):
    plain, model, dynamic = logits(tiny_llama(), tokens), tiny_llama(), tiny_llama()
    prepare(model, STATIC, init=init, calibration=tokens, observer="mse")
    prepare(dynamic, QuantScheme(8, 16, act_bits=8), init=init, calibration=tokens)
    error, least = ((logits(m, tokens) - plain).norm() / plain.norm() for m in (model, dynamic))
    assert least < error < 0.1


def test_following_is_switched(tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, STATIC, calibration=tokens)
    follow_activations(model, False)
    assert not any(layer.observing for layer in static_layers(model))
    follow_activations(model, True)
    assert all(layer.observing for layer in static_layers(model))


def test_dynamic_models_are_left_alone(tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, QuantScheme(8, 16, act_bits=8))
    observe_activations(model, tokens, "anything")
    follow_activations(model, True)
    assert not static_layers(model)


def test_unknown_observer(tiny_llama, tokens):
    with pytest.raises(LlmqatError, match="no observer 'max'; choose one of minmax"):
        prepare(tiny_llama(), STATIC, calibration=tokens, observer="max")
