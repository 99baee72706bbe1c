from contextlib import nullcontext

import pytest
import torch

from llmqat.algorithms import gptq_model as driver
from llmqat.algorithms.blocks import layers_of
from llmqat.algorithms.gptq_model import GptqSettings, gptq_model
from llmqat.errors import LlmqatError
from llmqat.models.patcher import prepare
from llmqat.quant.affine import fake_quantize_activation, grouped
from llmqat.scheme import QuantScheme
from tests.algorithms.helpers import STAGES, prepared
from tests.covering import every
from tests.narrow_products import narrow_products


def run_gptq(model, tokens, keep_float=False):
    return gptq_model(model, model.model.layers, tokens, GptqSettings(0.01, keep_float))


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[0]).logits


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_every_layer_is_fitted_to_its_inputs_on_the_quantized_prefix(
    tiny_llama, tiny_moe, tokens, act_bits, family, monkeypatch
):
    """What each layer of the *finished* model reads is what GPTQ was given for it, one after the other."""
    model = tiny_llama() if family == "llama" else tiny_moe(family)
    prepare(model, QuantScheme(3, 16, act_bits=act_bits))
    given, quantize_layer = {}, driver._quantize_layer

    def spy(layer, seen, *args):
        given[layer] = seen.H
        return quantize_layer(layer, seen, *args)

    monkeypatch.setattr(driver, "_quantize_layer", spy)
    run_gptq(model, tokens)
    layers = layers_of(model)
    assert set(given) == set(layers.values())
    seen = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    for batch in tokens:
        with torch.no_grad():
            model(input_ids=batch)
    for name, layer in layers.items():
        x = torch.cat([x.flatten(0, -2) for x in seen[name]])
        x = x if act_bits is None else fake_quantize_activation(x)
        torch.testing.assert_close(given[layer], 2 / len(x) * x.T @ x, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("storage", "symmetric"), [(torch.float32, True), (torch.bfloat16, False), (torch.float16, True)], ids=str
)
def test_keep_float_finds_the_same_codes_and_keeps_the_float_model(tiny_llama, tokens, storage, symmetric):
    float_logits = logits(tiny_llama(), tokens)
    models = {}
    for keep in (False, True):
        models[keep], _ = prepared(tiny_llama(), QuantScheme(4, 16, symmetric), storage_dtype=storage)
        run_gptq(models[keep], tokens, keep)
    for a, b in zip(*(layers_of(m).values() for m in models.values()), strict=True):
        assert torch.equal(a.codes(), b.codes())
        assert torch.equal(a.stored_scale(), b.stored_scale())
        assert torch.equal(a.quantized_weight(), b.quantized_weight())
        assert a.compensation is None
        assert b.compensation.multiples.any()
    assert torch.equal(logits(models[True], tokens), logits(models[False], tokens))
    for layer in layers_of(models[True]).values():
        layer.enabled = False
    assert torch.equal(logits(models[True], tokens), float_logits)


def test_compensation_takes_a_byte_and_is_near_the_latent(tiny_llama, tokens):
    models = {}
    for keep in (True, False):
        models[keep], _ = prepared(tiny_llama(), QuantScheme(4, 16), storage_dtype=torch.bfloat16)
        run_gptq(models[keep], tokens, keep)
    for kept, plain in zip(*(layers_of(m).values() for m in models.values()), strict=True):
        assert kept.compensation.multiples.dtype == torch.int8
        assert not any(p.requires_grad for p in (kept.compensation_multiples, kept.compensation_step))
        apart = (
            grouped(kept.latent().rows(slice(None)) - plain.weight, kept.scheme).abs() / plain.scale.abs()[..., None]
        )
        assert apart.mean() < 0.02, "of a code"


def test_latents_are_kept_between_codes_for_training(tiny_llama, tokens):
    model, _ = prepared(tiny_llama())
    run_gptq(model, tokens)
    layer = model.model.layers[1].mlp.down_proj
    assert (layer.weight - layer.quantized_weight()).abs().max() > 0.2 * layer.scale.abs().min()


@pytest.mark.parametrize(("bits", "symmetric", "act_bits"), every(2, (2, 3, 4, 8), (True, False), (None, 8)), ids=str)
def test_every_layer_improves_and_so_does_the_model(tiny_llama, tokens, bits, symmetric, act_bits):
    scheme = QuantScheme(bits, 16, symmetric, act_bits)
    model, _ = prepared(tiny_llama(), scheme)
    before = {name: layer.weight.detach().clone() for name, layer in layers_of(model).items()}
    plain = logits(model, tokens)
    errors = run_gptq(model, tokens)
    assert [e.layer for e in errors] == [f"block {i} {n}" for i in range(2) for stage in STAGES for n in stage]
    assert all(0 < e.gptq < e.rtn for e in errors)
    if bits < 8 and act_bits is None:
        float_logits = logits(tiny_llama(), tokens)
        assert (logits(model, tokens) - float_logits).norm() < 0.9 * (plain - float_logits).norm()
    assert all(not torch.equal(before[name], layer.weight) for name, layer in layers_of(model).items())


def test_runs_in_bfloat16_and_restores_the_mode(tiny_llama, tokens):
    model, _ = prepared(tiny_llama().to(torch.bfloat16).train())
    errors = run_gptq(model, tokens, keep_float=True)
    assert model.training
    assert all(e.gptq < e.rtn for e in errors)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    "batches", [[], [torch.zeros(2, 8), torch.zeros(2, 9)], [torch.zeros(2, 8), torch.zeros(1, 8)]]
)
def test_batches_of_one_shape(tiny_llama, batches):
    model, _ = prepared(tiny_llama().train())
    with pytest.raises(LlmqatError, match="at least one batch, and all batches of one shape"):
        run_gptq(model, [b.long() for b in batches])
    assert model.training, "a failure leaves the model in the mode it was in"


def test_a_failure_names_the_layer(tiny_llama, tokens):
    model = tiny_llama()
    model.model.layers[1].input_layernorm.weight.data[3] = torch.nan
    model, _ = prepared(model.train())
    with pytest.raises(LlmqatError, match=r"calibration inputs of block 1 self_attn\.q_proj hold NaN"):
        run_gptq(model, tokens)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_blocks_without_quantized_layers_are_passed_through(tiny_llama, tokens):
    model, _ = prepared(tiny_llama(), overrides={r"layers\.0\.": "float"})
    assert {e.layer.split()[1] for e in run_gptq(model, tokens)} == {"1"}


def test_products_are_those_of_float32(tiny_llama, tokens):
    models = []
    for narrow in (False, True):
        models.append(prepared(tiny_llama(), QuantScheme(4, 16))[0])
        with narrow_products() if narrow else nullcontext():
            run_gptq(models[-1], tokens)
    for a, b in zip(*(layers_of(model).values() for model in models), strict=True):
        assert torch.equal(a.weight, b.weight)
