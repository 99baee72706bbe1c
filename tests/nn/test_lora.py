import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from llmqat.compat.peft import register_layers
from llmqat.errors import LlmqatError
from llmqat.models.patcher import prepare
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme
from tests.narrow_products import narrow_products
from tests.quant.helpers import random_change

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def lora_config(**options):
    config = LoraConfig(r=4, lora_alpha=7, target_modules=TARGETS, **options)
    register_layers(config, {FakeQuantLinear: LoraFakeQuantLinear})
    return config


@pytest.fixture
def prepared(tiny_llama):
    def make(compensation=False):
        model = tiny_llama()
        prepare(model, QuantScheme(4, 16), storage_dtype=torch.bfloat16)
        if compensation:  # as GPTQ with keep_float leaves it
            for layer in model.modules():
                if isinstance(layer, FakeQuantLinear):
                    layer.compensation = random_change(*layer.weight.shape, 16, 0.02)
        return model

    return make


def adapters_of(model):
    return [m for m in model.modules() if isinstance(m, LoraFakeQuantLinear)]


def codes(model):
    return [m.base_layer.codes(m.adapters()) for m in adapters_of(model)]


@torch.no_grad()
def latent(module):
    return module.base_layer.latent(module.adapters()).rows(slice(None))


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[0]).logits


def train_step(model, tokens):
    model.train()
    model(input_ids=tokens[0], labels=tokens[0]).loss.backward()
    with torch.no_grad():
        for p in model.parameters():  # B starts at zero: the second step moves A too
            if p.grad is not None:
                p -= 0.05 * p.grad / p.grad.abs().max().clamp(min=1e-12)
    model.zero_grad()
    model.eval()


@pytest.fixture
def trained(prepared, tokens):
    def make(compensation=False):
        model = get_peft_model(prepared(compensation), lora_config())
        train_step(model, tokens)
        train_step(model, tokens)
        return model

    return make


def test_wraps_every_layer_and_starts_at_the_prepared_model(prepared, tokens):
    model = prepared(compensation=True)
    plain = logits(model, tokens)
    model = get_peft_model(model, lora_config())
    assert len(adapters_of(model)) == 14
    assert torch.equal(logits(model, tokens), plain)
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 28
    assert all(".lora_A." in name or ".lora_B." in name for name in trainable)


def test_adapters_train_inside_the_quantizer(prepared, tokens):
    model = get_peft_model(prepared(), lora_config())
    before = codes(model)
    train_step(model, tokens)
    train_step(model, tokens)
    assert all(not torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))
    layer = adapters_of(model)[0]
    base = layer.base_layer
    w_hat = dequantize(base.codes(layer.adapters()), base.stored_scale(), None, base.scheme)
    assert torch.equal(layer(torch.eye(base.in_features)).T, w_hat.float()), "the output is on the grid"
    expected = base.weight + layer.get_delta_weight("default")
    assert (w_hat.float() - expected).abs().max() <= 1.1 * base.scale.abs().max()


def test_saves_an_ordinary_adapter_and_reloads_it(trained, prepared, tokens, tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {p.name for p in tmp_path.iterdir()}
    reloaded = PeftModel.from_pretrained(prepared(), tmp_path, config=lora_config())
    assert len(adapters_of(reloaded)) == 14
    assert torch.equal(logits(reloaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("compensation", [False, True])
def test_merging_keeps_every_bit_that_is_quantized(trained, tokens, compensation):
    model = trained(compensation)
    before, y = codes(model), logits(model, tokens)
    layers = adapters_of(model)
    masters = [m.base_layer.weight.detach().clone() for m in layers]
    latents = [latent(m) for m in layers]
    model.merge_adapter(safe_merge=True)
    assert all(m.merged and not m.adapters() for m in layers)
    for m, expected in zip(layers, latents, strict=True):
        assert torch.equal(latent(m), expected)
    assert all(torch.equal(a, b) for a, b in zip(codes(model), before, strict=True))
    assert torch.equal(logits(model, tokens), y)
    model.unmerge_adapter()
    for m, master in zip(layers, masters, strict=True):
        torch.testing.assert_close(m.base_layer.weight.detach(), master, rtol=0, atol=1e-6)


def test_adapters_of_a_model_in_its_stored_dtype(tiny_llama, tokens):
    """They start as those of float32 masters do, and merging rounds neither: the base becomes float32."""
    found = []
    for frozen in (False, True):
        torch.manual_seed(1)
        model = tiny_llama().bfloat16().requires_grad_(not frozen)
        prepare(model, QuantScheme(4, 16))
        model = get_peft_model(model, lora_config(init_lora_weights=False))
        layers = adapters_of(model)
        assert {p.dtype for m in layers for p in m.adapter_parameters()} == {torch.float32}
        assert {m.base_layer.weight.dtype for m in layers} == {torch.bfloat16 if frozen else torch.float32}
        found.append([*codes(model), *(latent(m) for m in layers)])
        model.merge_adapter()
        found.append([*codes(model), *(latent(m) for m in layers)])
    assert all(torch.equal(value, first) for others in found for value, first in zip(others, found[0], strict=True))


def test_several_adapters_add_up_and_can_be_switched_off(trained, tokens):
    model = trained()
    layer = adapters_of(model)[0]
    model.add_adapter("second", lora_config())
    torch.nn.init.normal_(layer.lora_B["second"].weight)
    first, second = layer.get_delta_weight("default"), layer.get_delta_weight("second")
    model.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(latent(layer), layer.base_layer.weight + first + second)
    both = latent(layer)
    model.merge_adapter()
    assert torch.equal(latent(layer), both)
    model.unmerge_adapter()
    model.base_model.set_adapter("second")
    torch.testing.assert_close(latent(layer), layer.base_layer.weight + second)
    with model.disable_adapter():
        assert layer.adapters() is None
        assert torch.equal(latent(layer), layer.base_layer.weight)


def test_adapters_stay_float32_masters(trained):
    model = trained().to(torch.bfloat16)
    assert {p.dtype for m in adapters_of(model) for p in m.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    "option", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}], ids=lambda option: next(iter(option))
)
def test_rejects_what_has_no_meaning_inside(prepared, option):
    with pytest.raises(LlmqatError, match=r"lora_dropout, use_dora and lora_bias have no meaning .* leave them out"):
        get_peft_model(prepared(), lora_config(**option))


def test_safe_merge_refuses_non_finite_adapters(trained):
    model = trained()
    adapters_of(model)[3].lora_B["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(LlmqatError, match="adapter 'default' holds non-finite weights; train again"):
        model.merge_adapter(safe_merge=True)


def test_peft_does_not_warn_of_our_layer(prepared, recwarn):
    get_peft_model(prepared(), lora_config())
    assert not [warning for warning in recwarn if "Unsupported layer type" in str(warning.message)]


def test_what_adapters_add_is_multiplied_in_float32(trained):
    layer = adapters_of(trained())[0]
    expected = layer.get_delta_weight("default")
    with narrow_products():
        assert torch.equal(layer.get_delta_weight("default"), expected)
