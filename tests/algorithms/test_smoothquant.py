import pytest
import torch
from torch import nn

from llmqat.algorithms.smoothquant import fold, input_absmax, smooth_model, smoothing_scale
from llmqat.errors import LlmqatError

ATTENTION = ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
MLP = ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"))


def sites(*per_block):
    return [
        (f"model.layers.{i}.{norm}", [f"model.layers.{i}.{name}" for name in linears])
        for i in range(2)
        for norm, linears in per_block
    ]


@pytest.fixture
def outliers(tiny_llama):
    """A model whose norms blow a few channels up, and linears that take it back."""

    def make(dtype=torch.float32):
        model = tiny_llama()
        for block in model.model.layers:
            block.input_layernorm.weight.data[[3, 40]] *= 60
            block.post_attention_layernorm.weight.data[[7]] *= 200
        return model.to(dtype)

    return make


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[0]).logits


def absmax(model, tokens):
    layers = [model.get_submodule(linears[0]) for _, linears in sites(ATTENTION, MLP)]
    return input_absmax(model, layers, tokens)


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_keep_their_bits_while_outliers_shrink(outliers, tokens, alpha, dtype):
    model = outliers(dtype)
    before, plain = absmax(model, tokens), logits(model, tokens)
    changes = smooth_model(model, sites(ATTENTION, MLP), tokens, alpha)
    assert list(changes) == [norm for norm, _ in sites(ATTENTION, MLP)]
    assert max(changes.values()) <= 1e-6
    torch.testing.assert_close(logits(model, tokens), plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    for old, new in zip(before, absmax(model, tokens), strict=True):
        assert new.max() / new.median() < (old.max() / old.median()) ** (1.1 - 0.8 * alpha)


def test_absmax_is_that_of_all_batches(outliers, tokens):
    model, seen = outliers(), []
    layer = model.model.layers[1].mlp.gate_proj
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in tokens:
        logits(model, [batch])
    handle.remove()
    (found,) = input_absmax(model, [layer], tokens)
    assert torch.equal(found, torch.cat(seen).abs().amax((0, 1)))
    assert not layer._forward_pre_hooks


def test_scales_are_powers_of_two_next_to_the_formula():
    x, w = torch.rand(500) * 300 + 1e-3, torch.rand(500) + 1e-3
    x[7] = 0
    for alpha in (0.0, 0.3, 0.5, 0.85, 1.0):
        s = smoothing_scale(x, w, alpha)
        mantissa, _ = torch.frexp(s)
        assert (mantissa == 0.5).all()
        assert s[7] == 1
        used = x > 0
        off = (s / (x**alpha / w ** (1 - alpha))).log2()[used]
        assert off.abs().max() <= 0.5001


@pytest.mark.parametrize("norm", [nn.LayerNorm(8), nn.RMSNorm(8)], ids=["layer", "rms"])
def test_fold_keeps_what_the_linears_compute(norm):
    nn.init.normal_(norm.weight)
    if getattr(norm, "bias", None) is not None:
        nn.init.normal_(norm.bias)
    linears, x, s = [nn.Linear(8, 5), nn.Linear(8, 3)], torch.randn(4, 8), 2.0 ** torch.arange(-4, 4)
    before, normed = [linear(norm(x)) for linear in linears], norm(x)
    fold(norm, linears, s)
    for linear, y in zip(linears, before, strict=True):
        assert torch.equal(linear(norm(x)), y)
    assert torch.equal(norm(x), normed / s)


@pytest.mark.parametrize("missing", ["mlp.up_proj", "mlp.gate_proj"])
def test_a_norm_with_another_reader_is_put_back_and_named(outliers, tokens, missing):
    wrong = (MLP[0], tuple(name for name in MLP[1] if name != missing))
    model = outliers().train()
    before, plain = {name: p.clone() for name, p in model.named_parameters()}, logits(model.eval(), tokens)
    model.train()
    message = r"smoothing model\.layers\.0\.post_attention_layernorm changed the float logits by .*something else reads"
    with pytest.raises(LlmqatError, match=message):
        smooth_model(model, sites(wrong), tokens, 0.5)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert torch.equal(logits(model, tokens), plain)
    assert model.training, "a failure leaves the model in the mode it was in"


def test_restores_the_mode(outliers, tokens):
    model = outliers().train()
    smooth_model(model, sites(ATTENTION), tokens, 0.5)
    assert model.training


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan")])
def test_alpha_out_of_range(outliers, tokens, alpha):
    with pytest.raises(LlmqatError, match="alpha must lie between 0 and 1, got"):
        smooth_model(outliers(), sites(MLP), tokens, alpha)
