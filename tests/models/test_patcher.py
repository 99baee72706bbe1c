import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import llmqat
from llmqat.compat.peft import register_layers
from llmqat.errors import LlmqatError
from llmqat.models.loading import load_float
from llmqat.models.patcher import convert, prepare, quantized_layers, round_float_parts, smooth
from llmqat.models.planning import check_divisible, plan
from llmqat.nn.embedding import FakeQuantEmbedding
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme
from tests.serve.helpers import float_model

SCHEME = QuantScheme(4, 16)
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def schemes(report):
    return {layer.name: layer.scheme for layer in report.layers}


def gpt2():
    """Layers with biases."""
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))


@torch.no_grad()
def logits(model, tokens):
    return model(input_ids=tokens[0]).logits


@pytest.mark.parametrize(("tied", "reason"), [(False, "output head"), (True, "output head, tied to the embedding")])
def test_coverage(tiny_llama, tied, reason):
    model = tiny_llama(tie_word_embeddings=tied)
    report = prepare(model, SCHEME)
    assert [layer.name.rsplit(".", 1)[-1] for layer in report.quantized] == NAMES * 2
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("lm_head", reason)]
    assert isinstance(model.lm_head, nn.Linear)
    assert tied == (model.lm_head.weight is model.model.embed_tokens.weight)
    on_grid = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    assert report.total_parameters == on_grid + 128 * 64 * (1 if tied else 2) + 5 * 64
    assert report.parameters_quantized == on_grid / report.total_parameters
    summary = report.summary()
    assert summary.startswith("14 layers quantized, ")
    assert "W4A16 g16 symmetric: 14 layers" in summary
    assert f"float: lm_head ({reason})" in summary


def test_parameters_are_the_same_objects(tiny_llama):
    model = tiny_llama(attention_bias=True).to(torch.bfloat16)
    before = dict(model.named_parameters())
    report = prepare(model, QuantScheme(4, 16, symmetric=False))
    after = dict(model.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    for layer in report.quantized:
        module = model.get_submodule(layer.name)
        assert isinstance(module, FakeQuantLinear)
        assert module.weight.dtype == torch.float32
        assert module.storage_dtype == torch.bfloat16, "scales are stored in the model's dtype"
    assert model.model.norm.weight.dtype == torch.bfloat16


def test_options_reach_the_layers(tiny_llama):
    model = tiny_llama()
    prepare(model, SCHEME, storage_dtype=torch.float16, clip_mask=True)
    assert {(m.storage_dtype, m.clip_mask) for _, m, _ in quantized_layers(model)} == {(torch.float16, True)}


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_are_stored_in_the_dtype_of_the_files(tiny_llama, tmp_path, stored):
    """A model is loaded in float32 to be trained, and packed as it was stored."""
    tiny_llama().to(stored).save_pretrained(tmp_path)
    model = load_float(str(tmp_path), torch.float32)
    prepare(model, SCHEME)
    assert model.dtype == torch.float32
    assert {on_grid.layer.storage_dtype for on_grid in quantized_layers(model)} == {stored}


def test_overrides_change_layers_and_later_ones_win(tiny_llama):
    overrides = {
        "down_proj": {"bits": 8, "group_size": -1},
        r"layers\.1\.mlp": "float",
        r"1\.mlp\.up": {"symmetric": False},
    }
    model = tiny_llama()
    report = prepare(model, SCHEME, overrides=overrides)
    got = schemes(report)
    assert got["model.layers.0.mlp.down_proj"] == QuantScheme(8, -1)
    assert got["model.layers.1.mlp.down_proj"] is None
    assert got["model.layers.1.mlp.up_proj"] == QuantScheme(4, 16, False)
    assert got["model.layers.0.self_attn.q_proj"] == SCHEME
    reasons = {layer.name: layer.reason for layer in report.skipped}
    assert reasons["model.layers.1.mlp.gate_proj"] == "override"
    assert isinstance(model.model.layers[1].mlp.gate_proj, nn.Linear)


def test_plan_changes_nothing_and_runs_on_meta(tiny_llama):
    with torch.device("meta"):
        model = tiny_llama()
    report = plan(model, SCHEME)
    assert len(report.quantized) == 14
    assert not list(quantized_layers(model))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"down_proj": 8}, "override 'down_proj': write float, or any of bits, group_size, .* got 8"),
        ({"down_proj": {"width": 8}}, r"override 'down_proj': write float, or any of .* got \{'width': 8\}"),
        ({"down_proj": "int8"}, "write float, or any of .* got 'int8'"),
        ({"down_proj": {"bits": 5}}, "bits must be one of 2, 3, 4, 8, got 5"),
        ({"experts": "float"}, "override 'experts' matches no linear layer; the first ones are model.layers.0.self"),
        ({"*down": "float"}, r"override '\*down' is not a regular expression"),
    ],
)
def test_malformed_overrides(tiny_llama, overrides, message):
    with pytest.raises(LlmqatError, match=message):
        plan(tiny_llama(), SCHEME, overrides)


def test_indivisible_groups_name_every_layer_and_the_remedy(tiny_llama):
    model = tiny_llama()
    with pytest.raises(LlmqatError, match="group_size 64 does not divide 2 layers") as caught:
        prepare(model, QuantScheme(4, 64))
    message = str(caught.value)
    for part in ("model.layers.0.mlp.down_proj (in_features 96)", "model.layers.1.mlp.down_proj (in_features 96)"):
        assert part in message
    assert "--override 'down_proj$:group_size=-1'" in message
    assert "choose a --group-size that divides 32" in message
    assert not list(quantized_layers(model)), "a refusal changes nothing"
    remedy = {"down_proj$": {"group_size": -1}}
    assert f"overrides={remedy}" in message
    assert len(prepare(model, QuantScheme(4, 64), overrides=remedy).quantized) == 14
    check_divisible(plan(tiny_llama(), QuantScheme(4, int(re.search(r"divides (\d+)", message)[1]))))


def test_prepared_once(tiny_llama):
    model = tiny_llama()
    prepare(model, SCHEME)
    with pytest.raises(LlmqatError, match="prepared already; load it again"):
        prepare(model, SCHEME)


def test_unknown_init(tiny_llama):
    with pytest.raises(LlmqatError, match="init must be one of gptq, blockwise, rtn; got 'awq'"):
        prepare(tiny_llama(), SCHEME, init="awq")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"kv_bit": 8}, r"^prepare has no option 'kv_bit'; did you mean kv_bits\?$"),
        ({"storage_dtyp": torch.float16}, r"no option 'storage_dtyp'; did you mean storage_dtype\?"),
        (
            {"xyz": 1},
            "no option 'xyz'; known: overrides, storage_dtype, damp, block_steps, clip_mask, keep_float, lm_head",
        ),
        ({"overrides": ["mlp"]}, r"^overrides must be a mapping, pattern -> change; got \['mlp'\]$"),
        ({"storage_dtype": "bfloat16"}, r"storage_dtype must be a float dtype such as torch\.bfloat16, got 'bfloat16'"),
        ({"storage_dtype": torch.int8}, r"storage_dtype must be a float dtype such as .*, got torch\.int8"),
        ({"damp": -0.1}, r"^damp must be at least 0, got -0\.1$"),
        ({"damp": float("nan")}, "^damp must be at least 0, got nan$"),
        ({"clip_mask": "no"}, "^clip_mask must be true or false, got 'no'$"),
        ({"keep_float": 1}, "^keep_float must be true or false, got 1$"),
        ({"min_coverage": 90}, "^min_coverage must be at most 1, got 90"),
        ({"kv_bits": 4}, "^kv_bits must be 8, or left out for a float cache; got 4$"),
        ({"observer": "max"}, "^no observer 'max'; choose one of minmax, moving_average, percentile, mse$"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_replaced(tiny_llama, option, message):
    model = tiny_llama()
    with pytest.raises(LlmqatError, match=message):
        prepare(model, SCHEME, **option)
    assert not quantized_layers(model)


@pytest.mark.parametrize("calibration", [None, []])
def test_gptq_needs_calibration(tiny_llama, calibration):
    model = tiny_llama()
    with pytest.raises(LlmqatError, match="at least one batch"):
        prepare(model, SCHEME, init="gptq", calibration=calibration)
    assert not list(quantized_layers(model)), "a refusal changes nothing"


def test_a_model_without_linear_layers_is_refused():
    """A report of nothing quantized would be a silent fallback."""
    config = GPT2Config(n_embd=32, n_layer=0, n_head=2, vocab_size=64, n_positions=16)
    with pytest.raises(LlmqatError, match="no linear layer to quantize"):
        prepare(GPT2LMHeadModel(config), SCHEME)


def test_low_coverage_is_an_error_unless_allowed(tiny_llama):
    """Weights that are no linear layer's, such as fused experts, must not stay float unnoticed."""
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.experts = nn.Parameter(torch.zeros(4, 64, 96))
    uncovered = 2 * (4 * 64 * 96 + 2 * 64)
    share = 1 - uncovered / (uncovered + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96))
    message = (
        rf"only {share:.1%} of the parameters of the blocks .* 90% are asked for; the largest others are "
        r"model\.layers\.0\.mlp\.experts \(0\.0246 M\), model\.layers\.1\.mlp\.experts .*, model\..*norm\.weight .*"
        r"allow it with --min-coverage 0\.55 \(Python: min_coverage=0\.55\)"
    )
    with pytest.raises(LlmqatError, match=message):
        prepare(model, SCHEME)
    assert not list(quantized_layers(model)), "a refusal changes nothing"
    report = prepare(model, SCHEME, min_coverage=0.55)
    assert report.block_coverage == pytest.approx(share)
    assert f"layers that can be are {share:.1%} of the blocks" in report.summary()


def test_layers_left_float_on_purpose_are_covered(tiny_llama):
    report = prepare(tiny_llama(), SCHEME, overrides={"mlp": "float"})
    assert report.block_coverage > 0.99
    assert set(report.uncovered) == {
        f"model.layers.{i}.{norm}.weight" for i in range(2) for norm in ("input_layernorm", "post_attention_layernorm")
    }


def test_conv1d_layers_share_one_grid():
    """transformers would read all layers by the first one's grid."""
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)
    message = "layers of GPT2LMHeadModel are Conv1D, .* one grid, not W4A16 g16 symmetric and W8A16 g16 symmetric; give"
    with pytest.raises(LlmqatError, match=message):
        plan(GPT2LMHeadModel(config), SCHEME, {"c_proj": {"bits": 8}})
    report = plan(GPT2LMHeadModel(config), SCHEME, {"c_proj": "float"})
    assert [layer.name.split(".")[-1] for layer in report.quantized] == ["c_attn", "c_fc"]
    assert [layer.shape for layer in report.quantized] == [(96, 32), (128, 32)]


def test_smooth_covers_every_block(tiny_llama, tokens):
    model = tiny_llama()
    before = logits(model, tokens)
    changes = smooth(model, tokens, 0.5)
    sites = ("input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj")
    assert list(changes) == [f"model.layers.{i}.{site}" for i in range(2) for site in sites]
    torch.testing.assert_close(logits(model, tokens), before)


def test_smooth_auto_searches_with_the_overridden_grid(tiny_llama, tokens):
    with pytest.raises(LlmqatError, match=r"'auto' searches with the real quantizers; pass scheme=QuantScheme\("):
        smooth(tiny_llama(), tokens, "auto")
    done = smooth(tiny_llama(), tokens, "auto", scheme=SCHEME, overrides={"o_proj$": "float"})
    assert done["model.layers.0.self_attn.v_proj"].errors == (0, 0), "float layers have nothing to gain"
    assert done["model.layers.0.mlp.up_proj"].errors[0] > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["rtn", "gptq"])
@pytest.mark.parametrize("act_bits", [None, 8])
def test_convert_runs_what_was_trained(reference_op, tiny_llama, tokens, symmetric, init, dtype, act_bits):
    model = tiny_llama(tie_word_embeddings=symmetric).to(dtype)
    scheme = QuantScheme(4, 16, symmetric, act_bits)
    report = prepare(model, scheme, init=init, calibration=tokens, keep_float=symmetric)
    assert len(report.errors) == (14 if init == "gptq" else 0)
    codes = {name: layer.codes() for name, layer, _ in quantized_layers(model)}
    expected = logits(model, tokens)
    assert convert(model) is model
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    assert list(packed) == list(codes)
    assert all(torch.equal(m.unpack()[0], codes[name]) for name, m in packed.items())
    assert torch.equal(logits(model, tokens), expected)


def test_convert_takes_adapters_along(reference_op, tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, SCHEME, storage_dtype=torch.bfloat16)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=NAMES[:5], init_lora_weights=False)
    register_layers(config, {FakeQuantLinear: LoraFakeQuantLinear})
    plain = logits(model, tokens)
    adapted = get_peft_model(model, config)
    layers = list(quantized_layers(adapted))
    assert [name for name, *_ in layers] == [layer.name for layer in plan(tiny_llama(), SCHEME).quantized]
    assert sum(on_grid.adapters is not None for on_grid in layers) == 10
    expected = logits(adapted, tokens)
    assert not torch.equal(expected, plain)
    packed = convert(adapted)
    assert packed is model
    assert sum(isinstance(m, PackedLinear) for m in packed.modules()) == 14
    assert not any("lora" in name for name, _ in packed.named_modules())
    assert torch.equal(logits(packed, tokens), expected)


def test_nothing_to_convert(tiny_llama):
    with pytest.raises(LlmqatError, match=r"nothing to convert: .* call llmqat.prepare first"):
        convert(tiny_llama())


def test_float_parts_are_rounded_to_storage_and_the_grid_is_left_alone(tiny_llama):
    model = tiny_llama(attention_bias=True)
    prepare(model, SCHEME, storage_dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1e-3 * torch.randn_like(parameter)
    on_grid = {n: p.clone() for n, p in model.named_parameters() if n.endswith((".scale", "_proj.weight"))}
    round_float_parts(model)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        rounded = parameter.to(torch.bfloat16).float()
        assert torch.equal(parameter, on_grid.get(name, rounded)), name
    assert any(not torch.equal(p, p.to(torch.bfloat16).float()) for p in on_grid.values())


@pytest.mark.parametrize(("tied", "role"), [(False, "output head"), (True, "output head, tied to the embedding")])
def test_the_head_on_a_grid_of_its_own(tiny_llama, tied, role):
    model = tiny_llama(tie_word_embeddings=tied)
    report = prepare(model, QuantScheme(4, 16, act_bits=8), lm_head_bits=8)
    assert schemes(report)["lm_head"] == QuantScheme(8, 16, act_bits=8)
    assert not report.skipped
    on_grid = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + 128 * 64
    assert report.parameters_quantized == on_grid / report.total_parameters
    assert f"of these, lm_head: W8A8 g16 symmetric ({role})" in report.summary()
    assert isinstance(model.model.embed_tokens, FakeQuantEmbedding) == tied


def test_overrides_reach_a_quantized_head_only(tiny_llama):
    model = tiny_llama()
    overrides = {"lm_head": {"group_size": -1}}
    assert schemes(plan(model, SCHEME, overrides, 8))["lm_head"] == QuantScheme(8, -1)
    assert schemes(plan(model, SCHEME, overrides))["lm_head"] is None
    report = plan(model, SCHEME, {"lm_head": "float"}, 8)
    assert [(layer.name, layer.reason) for layer in report.skipped] == [("lm_head", "override")]
    with pytest.raises(LlmqatError, match=r"group_size 48 does not divide .*lm_head .in_features 64"):
        check_divisible(plan(model, QuantScheme(4, 48), None, 8))


def test_a_tied_head_that_is_read_as_a_matrix():
    model = float_model("gemma4_text", beside="gemma4", tie_word_embeddings=True)
    message = "lm_head_bits is 8, but Gemma4ForConditionalGeneration reads the tied embedding of its side inputs as"
    with pytest.raises(LlmqatError, match=message):
        plan(model, SCHEME, None, 8)


def test_a_model_without_a_head(tiny_llama):
    with pytest.raises(LlmqatError, match="lm_head_bits is 8, but LlamaModel has no Linear output head; leave it out"):
        plan(tiny_llama().model, SCHEME, None, 8)


@pytest.mark.parametrize("keep_float", [False, True])
def test_gptq_fits_a_narrow_head_to_the_final_hidden_states(tiny_llama, tokens, keep_float):
    model = tiny_llama()
    before = model.lm_head.weight.detach().clone()
    report = prepare(model, SCHEME, init="gptq", calibration=tokens, lm_head_bits=4, keep_float=keep_float)
    rtn, gptq = report.errors["output head"]
    assert gptq < 0.9 * rtn
    x = model.model(input_ids=tokens[0]).last_hidden_state.detach()
    exact = x @ before.T
    assert float((model.lm_head(x) - exact).square().sum() / exact.square().sum()) < rtn
    assert torch.equal(model.lm_head.weight, before) == keep_float
    report = prepare(tiny_llama(), SCHEME, init="gptq", calibration=tokens, lm_head_bits=8)
    assert "output head" not in report.errors, "at 8 bits there is nothing to gain"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("init", ["rtn", "gptq"])
def test_weights_that_are_not_finite_are_refused_by_name(tiny_llama, tokens, value, init):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] = value
    with pytest.raises(LlmqatError, match=r"weight of model.layers.1.mlp.up_proj holds NaN or infinity; copy the"):
        prepare(model, SCHEME, init=init, calibration=tokens if init == "gptq" else None)
    assert not quantized_layers(model), "a refusal changes nothing"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("tensor", ["weight", "scale", "zero_point", "bias"])
def test_a_layer_that_cannot_be_stored_is_named(tensor, value):
    model = gpt2()
    prepare(model, QuantScheme(4, 16, symmetric=False))
    name, layer, _ = quantized_layers(model)[3]
    getattr(layer, tensor).data.view(-1)[1] = value
    what = tensor.replace("_", " ")
    with pytest.raises(
        LlmqatError, match=f"^the {what} of {re.escape(name)} holds NaN or infinity; copy .* lower learn"
    ):
        convert(model)
    assert len(quantized_layers(model)) > 3, "a refusal changes nothing"


@pytest.mark.parametrize("tensor", ["scale", "bias"])
def test_training_that_drove_a_tensor_beyond_its_storage_dtype_is_refused(tensor):
    model = gpt2()
    prepare(model, SCHEME, storage_dtype=torch.float16)
    name, layer, _ = quantized_layers(model)[0]
    getattr(layer, tensor).data.view(-1)[0] = -7e4
    with pytest.raises(LlmqatError, match=f"^the {tensor} of {re.escape(name)} reaches 7e.04, and float16 holds 6.55e"):
        convert(model)
    getattr(layer, tensor).data.view(-1)[0] = -6.5e4
    convert(model)


def test_an_adapter_that_cannot_be_stored_is_named(tiny_llama):
    model = tiny_llama()
    prepare(model, SCHEME)
    model = llmqat.add_lora(model)
    name, _, adapters = quantized_layers(model)[0]
    adapters.b.data[0, 0] = torch.nan
    with pytest.raises(LlmqatError, match=f"^an adapter of {re.escape(name)} holds NaN or infinity"):
        convert(model)


def test_static_activations_without_a_range_name_their_layer(tiny_llama, tokens):
    model = tiny_llama()
    prepare(model, QuantScheme(8, 16, act_bits=8, act_static=True))
    for use in (lambda: model.eval()(input_ids=tokens[0]), lambda: convert(model)):
        with pytest.raises(
            LlmqatError, match=r"^static activations of model\.layers\.0\.self_attn\.q_proj have no range yet"
        ):
            use()
    model.model.layers[1].input_layernorm.weight.data.fill_(torch.nan)
    with pytest.raises(
        LlmqatError, match=r"^the inputs of model\.layers\.1\.self_attn\.q_proj with static activations hold"
    ):
        llmqat.observe_activations(model, tokens)


@pytest.mark.parametrize("mode", ["full", "lora", "scales"])
def test_a_frozen_model_keeps_its_dtype_until_it_is_known_what_trains(tiny_llama, tokens, mode):
    """With GPTQ, whose changed weights need more bits."""
    model = tiny_llama(attention_bias=True).bfloat16().requires_grad_(False)
    prepare(model, SCHEME, init="gptq", calibration=tokens, keep_float=mode != "full")
    layers = [on_grid.layer for on_grid in quantized_layers(model)]
    stored = torch.float32 if mode == "full" else torch.bfloat16
    assert {layer.weight.dtype for layer in layers} == {stored}
    model = llmqat.add_lora(model) if mode == "lora" else model
    codes = [layer.codes() for layer in layers]
    llmqat.finetune(model, tokens[0], tokens[1], mode=mode, max_steps=1, batch_size=2)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {layer.weight.dtype for layer in layers} == {stored}
    assert mode != "scales" or all(torch.equal(c, layer.codes()) for c, layer in zip(codes, layers, strict=True))
