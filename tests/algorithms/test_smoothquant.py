import pytest
import torch

from llmqat.algorithms.smoothquant import (
    ALPHAS,
    LEAST_EXPERT_TOKENS,
    Smoothed,
    observe_readers,
    readers_error,
    search_alpha,
    smooth_model,
    smoothing_scale,
    smoothing_summary,
)
from llmqat.errors import LlmqatError
from llmqat.models.smooth_sites import LLAMA, folds_of
from llmqat.quant.affine import fake_quantize_activation
from llmqat.scheme import QuantScheme

W8A8, W4 = QuantScheme(8, -1, act_bits=8), QuantScheme(4, 16)


def folds(model, scheme=W8A8, sites=LLAMA):
    return [
        fold
        for i, block in enumerate(model.model.layers)
        for fold in folds_of(block, f"model.layers.{i}.", sites, model.config, lambda _: scheme)
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
    norms = [fold for fold in folds(model) if "norm" in fold.name]
    return [inputs.absmax for inputs in observe_readers(model, [fold.observed for fold in norms], tokens, 0)]


@pytest.mark.parametrize("alpha", [0.25, 0.5, 0.85, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_keep_their_bits_while_outliers_shrink(outliers, tokens, alpha, dtype):
    model = outliers(dtype)
    before, plain = absmax(model, tokens), logits(model, tokens)
    done = smooth_model(model, folds(model), tokens, alpha, dtype)
    assert list(done) == [fold.name for fold in folds(model)]
    assert max(site.change for site in done.values()) <= 1e-6
    assert {site.alpha for site in done.values()} == {alpha}
    torch.testing.assert_close(logits(model, tokens), plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    for old, new in zip(before, absmax(model, tokens), strict=True):
        assert new.max() / new.median() < (old.max() / old.median()) ** (1.1 - 0.8 * alpha)


def test_observes_all_batches_and_draws_some_tokens(outliers, tokens):
    model, seen = outliers(), []
    layer = model.model.layers[1].mlp.gate_proj
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    for batch in tokens:
        logits(model, [batch])
    handle.remove()
    (found,) = observe_readers(model, [layer], tokens, 10)
    everything = torch.cat(seen).flatten(0, -2)
    assert torch.equal(found.absmax, everything.abs().amax(0))
    assert found.sample.shape == (12, 64), "10 tokens, in equal parts from 4 batches"
    assert all((everything == row).all(1).any() for row in found.sample)
    assert len(found.sample.unique(dim=0)) == 12
    assert torch.equal(observe_readers(model, [layer], tokens, 10)[0].sample, found.sample), "the same draw every time"
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


def test_output_error_is_that_of_the_quantized_layers(outliers, tokens):
    """Against the model itself: the layer on its grid, fed with the smoothed input."""
    from llmqat.nn.fake_quant_linear import FakeQuantLinear

    model = outliers()
    fold = folds(model)[0]
    x = torch.randn(30, 64)
    s = 2.0 ** torch.randint(-3, 4, (64,))
    layers = [getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "k_proj", "v_proj")]
    with torch.no_grad():
        plain = [layer(x) for layer in layers]
    expected = readers_error(fold, x, s, torch.float32)
    fold.apply(s)
    error = total = 0.0
    for layer, y in zip(layers, plain, strict=True):
        quantized = FakeQuantLinear.from_linear(layer, W8A8, torch.float32)
        error += float((quantized(x / s).detach() - y).square().sum())
        total += float(y.square().sum())
    assert error / total == pytest.approx(expected, rel=1e-3)
    assert error > 0


def test_without_act_bits_the_input_stays_float(outliers):
    fold, x = folds(outliers(), W4)[0], torch.randn(30, 64)
    assert readers_error(fold, x, torch.ones(64), torch.float32) == readers_error(
        fold, x, torch.ones(64), torch.float32
    )
    error = readers_error(fold, x, torch.ones(64), torch.float32)
    quantized = readers_error(fold, fake_quantize_activation(x), torch.ones(64), torch.float32)
    assert error != quantized


def test_search_takes_the_least_error_and_off_where_nothing_helps(outliers, tokens):
    model = outliers()
    names = [fold.name for fold in folds(model)]
    observed = observe_readers(model, [fold.observed for fold in folds(model)], tokens, 64)
    for fold, inputs in zip(folds(model), observed, strict=True):
        alpha, s, (off, least) = search_alpha(fold, inputs, torch.float32)
        errors = {
            a: readers_error(
                fold,
                inputs.sample,
                smoothing_scale(fold.largest(inputs.absmax), fold.weight_absmax(), a),
                torch.float32,
            )
            for a in ALPHAS
        }
        assert off == readers_error(fold, inputs.sample, torch.ones_like(s), torch.float32)
        assert least == min(off, *errors.values()) == readers_error(fold, inputs.sample, s, torch.float32)
        assert alpha is None or errors[alpha] == least
        if "norm" in fold.name:
            assert alpha is not None
            assert least < off / 4, "outliers are worth smoothing"
    assert len(names) == 8
    float_layers = folds(model, None)[0]
    assert search_alpha(float_layers, observed[0], torch.float32) == (None, pytest.approx(torch.ones(64)), (0.0, 0.0))


def test_auto_folds_what_it_chose_and_says_so(outliers, tokens):
    model = outliers()
    plain = logits(model, tokens)
    chosen = [
        search_alpha(f, i, torch.float32)[0] for f, i in zip(folds(model), observed_of(model, tokens), strict=True)
    ]
    done = smooth_model(model, folds(model), tokens, "auto", torch.float32)
    assert next(iter(done.values())).alpha == chosen[0]
    torch.testing.assert_close(logits(model, tokens), plain, rtol=0, atol=1e-6 * plain.abs().max().item())
    text = smoothing_summary(done)
    smoothed = sum(site.alpha is not None for site in done.values())
    assert f"smoothed {smoothed} of 8 sites; float logits changed by at most" in text
    for kind in ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"):
        assert f"  {kind}: output error" in text


def observed_of(model, tokens):
    return observe_readers(model, [fold.observed for fold in folds(model)], tokens, 512)


def test_describe():
    done = {
        "model.decoder.layers.0.fc1": Smoothed(0.5, 1e-7, (0.5, 0.25)),
        "model.decoder.layers.1.fc1": Smoothed(None, 0.0, (0.1, 0.1)),
    }
    assert smoothing_summary(done) == (
        "smoothed 1 of 2 sites; float logits changed by at most 1.0e-07 of the largest\n"
        "  fc1: output error 3.00e-01 -> 1.75e-01 on average; alpha by block: 0.5 off"
    )
    experts = {f"model.layers.0.mlp.experts.{i}.up_proj": Smoothed(0.5, 0.0, (0.4, 0.2)) for i in range(2)}
    experts |= {f"model.layers.1.mlp.experts.{i}.up_proj": Smoothed(None, 0.0, (0.1, 0.1)) for i in range(2)}
    experts |= {f"model.layers.1.mlp.experts.{i}.up_proj": Smoothed(None) for i in range(2, 9)}
    assert smoothing_summary(experts) == (
        "smoothed 2 of 11 sites; float logits changed by at most 0.0e+00 of the largest\n"
        "  mlp.experts.*.up_proj: output error 2.50e-01 -> 1.50e-01 on average; experts by alpha: 0.5: 2, off: 2\n"
        f"  left as they are, for fewer than {LEAST_EXPERT_TOKENS} calibration tokens: "
        "model.layers.1.mlp.experts.2.up_proj, "
        + "".join(f"model.layers.1.mlp.experts.{i}.up_proj, " for i in range(3, 6))
        + "model.layers.1.mlp.experts.6.up_proj and 2 more"
    )
    assert (
        smoothing_summary({"a": Smoothed(0.5, 0.0)})
        == "smoothed 1 of 1 sites; float logits changed by at most 0.0e+00 of "
        "the largest"
    )


def test_restores_the_mode(outliers, tokens):
    model = outliers().train()
    smooth_model(model, folds(model), tokens, 0.5, torch.float32)
    assert model.training


def test_a_failure_leaves_the_mode_and_what_was_not_folded(outliers, tokens):
    model = outliers().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    wrong = folds(model)[2]
    wrong = type(wrong)(wrong.name, wrong.written, wrong.read[:1], wrong.schemes[:1], wrong.observed, head_dim=64)
    with pytest.raises(LlmqatError, match=r"smoothing model\.layers\.0\.post_attention_layernorm changed the float"):
        smooth_model(model, [wrong], tokens, 0.5, torch.float32)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]), name
    assert model.training


@pytest.mark.parametrize("alpha", [-0.1, 1.01, float("nan"), "automatic", None])
def test_alpha_out_of_range(outliers, tokens, alpha):
    with pytest.raises(LlmqatError, match="alpha must lie between 0 and 1, or be auto; got"):
        smooth_model(outliers(), folds(outliers()), tokens, alpha, torch.float32)
