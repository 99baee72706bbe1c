import pytest
import torch

from llmqat.algorithms.gptq_model import GptqSettings
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.patcher import prepare, quantized_layers, run_gptq
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.nn.quantizers import disable_quantizers
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora, select_trainable

IDS = torch.arange(40).view(2, 20)


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def trained(model):
    """As if trained: everything that trains has moved."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter += torch.randn_like(parameter) * (1.0 if "lora_B" in name else 0.1 * parameter.abs().max())
    return model


def switches(model):
    """Every flag that a view could leave behind."""
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "enabled": [m.enabled for m in model.modules() if isinstance(m, FakeQuantLinear | LoraFakeQuantLinear)],
    }


@pytest.fixture(params=["lora", "scales"])
def run(request, tiny_llama, tokens):
    """A GPTQ-initialized model in the mode, its view, and the float logits."""
    model = tiny_llama()
    expected = logits(model)
    prepare(model, QuantScheme(3, 32), init="gptq", calibration=tokens, keep_float=True, storage_dtype=torch.bfloat16)
    if request.param == "lora":
        model = add_lora(model, 4)
    select_trainable(model, request.param)
    return model, FloatView(model), expected


def test_the_teacher_is_the_float_model_exactly(run):
    model, view, expected = run
    quantized = logits(trained(model))
    assert not torch.allclose(quantized, expected, atol=0.01)
    with view.active() as teacher:
        assert torch.equal(logits(teacher), expected)
    assert torch.equal(logits(model), quantized)


def test_norms_that_train_come_back(run):
    model, view, _ = run
    trained(model)
    norms = [p.clone() for name, p in model.named_parameters() if "norm" in name]
    pointers = [p.data_ptr() for p in model.parameters()]
    with view.active():
        pass
    assert all(map(torch.equal, norms, (p for name, p in model.named_parameters() if "norm" in name)))
    assert pointers == [p.data_ptr() for p in model.parameters()]  # the optimizer's tensors, not copies of them


@pytest.mark.parametrize("training", [True, False])
def test_flags_are_restored(run, training):
    model, view, _ = run
    model.train(training)
    before = switches(model)
    with view.active() as teacher:
        assert not teacher.training
        assert not torch.is_grad_enabled()
        assert not any(switches(model)["enabled"])
        assert switches(model)["requires_grad"] == before["requires_grad"]
    assert switches(model) == before
    with pytest.raises(RuntimeError, match="inside"), view.active():
        raise RuntimeError("inside")
    assert switches(model) == before


def test_views_nest(run):
    model, view, expected = run
    before = switches(model.eval())
    with view.active(), disable_quantizers(model):
        pass
    with view.active() as teacher:
        with view.active():
            pass
        assert torch.equal(logits(teacher), expected)
    assert switches(model) == before


def test_adapters_may_stay(run):
    """The float control of a LoRA run: adapters beside the float weight."""
    model, _, expected = run
    trained(model)
    with disable_quantizers(model, disable_adapters=False):
        beside = logits(model)
    if any(isinstance(m, LoraFakeQuantLinear) for m in model.modules()):
        assert not torch.allclose(beside, expected, atol=0.01)
        for _, layer, adapters in list(quantized_layers(model)):
            layer.weight.data += adapters.scaling * adapters.b.data @ adapters.a.data
        with disable_quantizers(model):
            torch.testing.assert_close(beside, logits(model), rtol=1e-4, atol=1e-4)
    else:
        with disable_quantizers(model):
            assert torch.equal(beside, logits(model))


def test_gradients_flow_after_a_view(run):
    model, view, _ = run
    with view.active() as teacher:
        targets = logits(teacher)
    (model(input_ids=IDS, use_cache=False).logits - targets).square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def test_gptq_without_keep_float_moves_the_teacher(tiny_llama, tokens):
    """Why the pipeline keeps the float weights apart."""
    model = tiny_llama()
    expected = logits(model)
    prepare(model, QuantScheme(3, 32))
    with FloatView(model).active() as teacher:
        assert torch.equal(logits(teacher), expected)
    run_gptq(model, tokens, GptqSettings())
    with FloatView(model).active() as teacher:
        assert not torch.equal(logits(teacher), expected)


def test_a_copy_is_frozen(tiny_llama):
    source = tiny_llama().train()
    copy = FloatCopy(source)
    assert not source.training
    assert not any(p.requires_grad for p in source.parameters())
    with copy.active() as teacher:
        assert teacher is source
        assert not torch.is_grad_enabled()


def test_a_part_is_float_while_the_rest_trains(tiny_llama):
    model = tiny_llama()
    prepare(model, QuantScheme(3, 32), keep_float=True, lm_head_bits=3)
    select_trainable(model, "scales")
    view = FloatView(model)
    trained(model).train()
    before, norm = switches(model), model.model.norm.weight.clone()
    with view.active(model.lm_head) as head:
        assert not head.training
        assert not head.enabled
        assert model.training
        assert torch.equal(model.model.norm.weight, norm)
        assert sum(not m.enabled for m in model.modules() if isinstance(m, FakeQuantLinear)) == 1
    assert switches(model) == before
