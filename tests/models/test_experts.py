"""Fused experts from the float model to the packed file and back, and what the report says about them."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

from llmqat.algorithms.activation_ranges import observe_activations
from llmqat.algorithms.fold import TOLERANCE
from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import readers, transformers_route
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.models.experts import file_name, module_name, routers
from llmqat.models.float_view import FloatView
from llmqat.models.patcher import prepare, quantized_layers, smooth
from llmqat.models.planning import plan
from llmqat.nn.expert_layout import is_fused
from llmqat.nn.experts import PROJECTIONS
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora, select_trainable

FAMILIES = ("mixtral", "qwen3_moe")
# Two blocks of attention, six experts of three projections in each of them, or in one and an ordinary MLP in the other.
LAYERS = {"mixtral": 2 * 4 + 2 * 18, "qwen3_moe": 2 * 4 + 18 + 3}
EXPERT = {
    "mixtral": "model.layers.1.block_sparse_moe.experts.5.w2.weight_packed",
    "qwen3_moe": "model.layers.0.mlp.experts.5.down_proj.weight_packed",
}
ROUTER = {"mixtral": "model.layers.0.block_sparse_moe.gate", "qwen3_moe": "model.layers.0.mlp.gate"}

SCHEMES = QuantScheme(4, 16), QuantScheme(3, 16, False), QuantScheme(8, -1, True, 8)

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def train(model, tokens, lr=0.003, steps=2):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr)
    model.train()
    for batch in tokens[:steps]:
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture
def routers_of(family):
    path = "mlp.gate.weight"
    return lambda model: {n: p.detach().clone() for n, p in model.named_parameters() if n.endswith(path)}


@pytest.mark.parametrize(("scheme", "mode"), zip(SCHEMES, ("full", "scales", "lora"), strict=True), ids=str)
def test_train_pack_load_gives_equal_codes_scales_and_logits(family, scheme, mode, tiny_moe, tokens, tmp_path):
    model = tiny_moe(family)
    prepare(model, scheme, storage_dtype=torch.bfloat16)
    if mode == "lora":
        model = add_lora(model, 4)
    select_trainable(model, mode)
    before = {name: layer.codes(adapters) for name, layer, adapters in quantized_layers(model)}
    train(model, tokens, 0.3 if mode == "lora" else 0.003)
    layers = {name: (layer, adapters) for name, layer, adapters in quantized_layers(model)}
    moved = {name for name, (layer, adapters) in layers.items() if not torch.equal(layer.codes(adapters), before[name])}
    assert (len(moved) > LAYERS[family] // 2) == (mode != "scales")
    check = verify(save_packed(model, tmp_path), against=model)
    assert check.ok
    assert check.layers == len(layers) == LAYERS[family]
    loaded = load_packed(tmp_path)
    for name, (layer, adapters) in layers.items():
        packed = loaded.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        codes, scale, zero_point = packed.unpack()
        assert torch.equal(codes, layer.codes(adapters))
        assert torch.equal(scale, layer.stored_scale())
        assert zero_point is None or torch.equal(zero_point, layer.stored_zero_point())


def test_logits_are_compared_on_the_same_routes(family, tiny_moe, tmp_path):
    """Experts so alike to their router that the last bit decides: float64 and float32 would choose differently."""
    model = tiny_moe(family)
    for layer in model.model.layers:
        if hasattr(layer.mlp, "gate"):
            row = layer.mlp.gate.weight[:1].detach()
            layer.mlp.gate.weight.data = row * (1 + 3e-7 * torch.randn(6, 64))
    prepare(model, QuantScheme(4, 16))
    save_packed(model, tmp_path)
    check = verify(tmp_path, against=model)
    assert check.ok
    assert check.max_logit_error < 1e-4


def test_scales_of_experts_train(family, tiny_moe, tokens):
    model = tiny_moe(family)
    prepare(model, QuantScheme(4, 16))
    select_trainable(model, "scales")
    before = {name: layer.scale.detach().clone() for name, layer, _ in quantized_layers(model)}
    train(model, tokens, 1e-3)
    assert all(not torch.equal(layer.scale, before[name]) for name, layer, _ in quantized_layers(model))


def test_files_name_experts_as_transformers_does(family, tiny_moe, tmp_path):
    """The names of transformers' own save: a matrix for each expert and projection, and the router's."""
    model = tiny_moe(family)
    model.save_pretrained(tmp_path / "float")
    expected = set(load_file(tmp_path / "float" / "model.safetensors"))
    prepare(model, QuantScheme(4, 16))
    tensors = load_file(save_packed(model, tmp_path / "packed") / "model.safetensors")
    suffixes = ("_packed", "_scale", "_shape")
    assert {name.removesuffix("_packed") for name in tensors if not name.endswith(suffixes[1:])} == expected
    assert EXPERT[family] in tensors
    assert all(module_name(model, file_name(model, name)) == name for name in model.state_dict())


def test_transformers_loads_the_packed_experts(family, tiny_moe, tokens, tmp_path):
    """Dequantized into its fused Parameters, and with the logits of the trained model."""
    model = tiny_moe(family)
    prepare(model, QuantScheme(4, 16))
    train(model, tokens)
    save_packed(model, tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected, logits = model(input_ids=tokens[0]).logits, loaded(input_ids=tokens[0]).logits
    down = loaded.model.layers[0].mlp.experts.down_proj
    assert torch.equal(down[2], model.model.layers[0].mlp.experts[2].down_proj.quantized_weight())
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_zero_points_of_experts_are_not_for_transformers(family, tiny_moe, tmp_path):
    """If transformers learns to read them, so should the exception end; `dense` is what it reads meanwhile."""
    model = tiny_moe(family)
    report = prepare(model, QuantScheme(4, 16, False))
    assert transformers_route(report) is None
    assert readers(report).endswith("come with several grids or experts: llmqat export --to dense")
    save_packed(model, tmp_path)
    assert "dequantize" not in json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    for options in ({}, {"quantization_config": CompressedTensorsConfig(dequantize=True)}):
        with pytest.raises(RuntimeError, match="issues during automatic conversion"):
            AutoModelForCausalLM.from_pretrained(tmp_path, **options)


def test_checkpoints_of_a_trainer_hold_the_models_own_names(family, tiny_moe, tmp_path):
    """`save_pretrained` of a family with fused experts renames, and a Trainer resumes by `load_state_dict`."""
    model = tiny_moe(family)
    prepare(model, QuantScheme(4, 16))
    model.save_pretrained(tmp_path)
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))


def test_the_float_model_is_still_inside(family, tiny_moe, tokens):
    """For distillation without a second copy, also after GPTQ."""
    model = tiny_moe(family)
    with torch.no_grad():
        expected = model(input_ids=tokens[0]).logits
        prepare(model, QuantScheme(4, 16), init="gptq", calibration=tokens, keep_float=True)
        assert not torch.allclose(model(input_ids=tokens[0]).logits, expected, atol=1e-2)
        with FloatView(model).active() as float_model:
            logits = float_model(input_ids=tokens[0]).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equal_experts_are_the_dense_layer(family, scheme, tiny_moe, tiny_llama, tokens):
    """Where all experts are the MLP of a Llama, the quantized model is the quantized Llama."""
    if family == "qwen3_moe":
        dense = tiny_moe(family, num_experts=6, mlp_only_layers=[0, 1])
        sparse = tiny_moe(family, moe_intermediate_size=96, mlp_only_layers=[])
    else:
        sparse = tiny_moe(family)
        dense = tiny_llama(rope_parameters=sparse.config.rope_parameters, rms_norm_eps=sparse.config.rms_norm_eps)
    with torch.no_grad():
        sparse.load_state_dict({n: p for n, p in dense.state_dict().items() if ".mlp." not in n}, strict=False)
        for block, other in zip(sparse.model.layers, dense.model.layers, strict=True):
            block.mlp.experts.gate_up_proj[:] = torch.cat([other.mlp.gate_proj.weight, other.mlp.up_proj.weight])
            block.mlp.experts.down_proj[:] = other.mlp.down_proj.weight
            block.mlp.gate.norm_topk_prob = True
        logits = []
        for model in (dense, sparse):
            prepare(model, scheme, storage_dtype=torch.bfloat16)
            logits.append(model(input_ids=tokens[0]).logits)
    if scheme.act_bits is None:
        assert torch.allclose(*logits, rtol=1e-4, atol=1e-5 * float(logits[0].abs().max()))
    else:  # half a step of an activation's code may go either way
        assert (logits[0] - logits[1]).square().mean() < 1e-4 * logits[0].square().mean()


def test_routers_stay_float_and_are_ignored_by_name(family, tiny_moe, tokens, tmp_path, routers_of):
    model = tiny_moe(family, torch.bfloat16)
    before = routers_of(model)
    prepare(model, QuantScheme(4, 16), init="gptq", calibration=tokens)
    save_packed(model, tmp_path)
    loaded = load_packed(tmp_path)
    assert before
    assert routers_of(loaded).keys() == before.keys()
    assert all(torch.equal(weight, before[name]) for name, weight in routers_of(loaded).items())
    assert ROUTER[family] in model_config(tmp_path)["ignore"]
    assert len(routers(model)) == len(before)


def model_config(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def test_the_report_counts_experts(family, tiny_moe):
    model = tiny_moe(family)
    report = plan(model, QuantScheme(4, 16))
    assert any(is_fused(module) for module in model.modules()), "a plan changes nothing"
    assert len(report.quantized) == LAYERS[family]
    assert [layer.name for layer in report.skipped] == ["lm_head"]
    expert = next(layer for layer in report.layers if layer.name.endswith("experts.3.down_proj"))
    assert expert.shape == (64, 96 if family == "mixtral" else 48)
    prepared = prepare(model, QuantScheme(4, 16))
    assert prepared.layers == report.layers
    assert [name for name, _, _ in quantized_layers(model)] == [layer.name for layer in report.quantized]
    on_grid = sum(layer.weight.numel() for _, layer, _ in quantized_layers(model))
    assert report.parameters_quantized == on_grid / report.total_parameters


def test_all_experts_can_have_other_bits(family, tiny_moe, tokens, tmp_path):
    """Which transformers finds by the pattern of their group."""
    model = tiny_moe(family)
    prepare(model, QuantScheme(4, 16), overrides={"experts": {"bits": 8}})
    save_packed(model, tmp_path)
    assert verify(tmp_path, against=model).ok
    logits = AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=tokens[0]).logits
    expected = model(input_ids=tokens[0]).logits
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_experts_of_a_block_can_stay_float(family, tiny_moe, tokens, tmp_path):
    model = tiny_moe(family)
    prepare(model, QuantScheme(4, 16), overrides={r"layers\.0\..*experts": "float"})
    assert isinstance(model.model.layers[0].mlp.experts[0].up_proj, nn.Linear)
    save_packed(model, tmp_path)
    assert verify(tmp_path, against=model).ok


@pytest.mark.parametrize("override", [{r"down_proj$": {"bits": 8}}, {r"experts\.3\.": "float"}])
def test_experts_cannot_be_told_apart(family, tiny_moe, override):
    """transformers would read all of them by the scheme of the first, and say nothing."""
    with pytest.raises(LlmqatError, match=r"overrides give experts several schemes \(.*W4A16.*experts:bits=8"):
        plan(tiny_moe(family), QuantScheme(4, 16), override)


def test_gptq_quantizes_experts_on_their_own_tokens(family, tiny_moe):
    """Better than round-to-nearest in all layers where enough tokens came by, and no worse a model."""
    batches = list(torch.randint(0, 128, (8, 8, 32)))
    model = tiny_moe(family)
    expected = model(input_ids=batches[0]).logits.detach()
    report = prepare(model, QuantScheme(4, 16), init="gptq", calibration=batches)
    assert len(report.errors) == LAYERS[family]
    assert not report.kept
    assert all(gptq < rtn for rtn, gptq in report.errors.values())
    rounded = tiny_moe(family)
    prepare(rounded, QuantScheme(4, 16))
    error = {m: float((m(input_ids=batches[0]).logits - expected).square().mean()) for m in (model, rounded)}
    assert error[model] < error[rounded]


def test_experts_without_enough_tokens_keep_round_to_nearest_and_are_reported(family, tiny_moe, tokens):
    """192 calibration tokens: enough for attention, which sees all of them; not for most experts."""
    model, rounded = tiny_moe(family), tiny_moe(family)
    with torch.no_grad():  # expert 4 wins no token, expert 0 all of them
        for layer in model.model.layers[:1]:
            layer.mlp.gate.weight[4], layer.mlp.gate.weight[0] = 0.0, 0.0
            layer.mlp.gate.register_forward_hook(lambda _, args, out: (out[0], out[1], fixed(out[2])))
    report = prepare(model, QuantScheme(4, 16), init="gptq", calibration=tokens)
    prepare(rounded, QuantScheme(4, 16))
    assert "block 0 mlp.experts.4.up_proj" in report.kept
    assert "block 0 mlp.experts.0.up_proj" not in report.kept
    assert len(report.errors) == LAYERS[family]
    for name in report.kept:
        path = name.replace("block ", "model.layers.").replace(" ", ".")
        assert torch.equal(model.get_submodule(path).codes(), rounded.get_submodule(path).codes())
    assert f"{len(report.kept)} layers saw fewer than 2 calibration tokens" in report.error_summary()


def fixed(index):
    """Expert 0 first for every token; of the others never expert 4."""
    rest = torch.where((index[:, 1] == 4) | (index[:, 1] == 0), 1, index[:, 1])
    return torch.stack([torch.zeros_like(rest), rest], 1)


def test_static_activations_of_experts_that_no_token_reached(family, tiny_moe, tokens, tmp_path, capsys):
    """They take the widest range beside them, run when a token comes after all, and follow what comes."""
    model = tiny_moe(family)
    handle = model.model.layers[0].mlp.gate.register_forward_hook(lambda _, __, out: (out[0], out[1], fixed(out[2])))
    prepare(model, QuantScheme(8, 16, act_bits=8, act_static=True), calibration=tokens, observer="minmax")
    handle.remove()
    experts = model.model.layers[0].mlp.experts
    said = " ".join(capsys.readouterr().err.split())
    assert (
        "no calibration token reached model.layers.0.mlp.experts.4: using the widest activation range of the other"
        in said
    )
    for projection in PROJECTIONS:
        scales = [float(getattr(expert, projection).act_scale) for expert in experts]
        assert scales[4] == max(scales)
        assert len(set(scales)) > 1
    before = experts[4].up_proj.act_scale.clone()
    experts[4].train()
    experts[4](torch.randn(3, 64))
    assert torch.equal(experts[4].up_proj.act_scale, before)
    experts[4](100 * torch.randn(3, 64))
    assert experts[4].up_proj.act_scale > before
    save_packed(model.eval(), tmp_path)
    assert verify(tmp_path, against=model).ok


def test_without_any_range_nothing_is_packed(family, tiny_moe, tokens, tmp_path):
    model = tiny_moe(family)
    prepare(model, QuantScheme(8, 16, act_bits=8, act_static=True))
    message = r"self_attn\.q_proj, .* and \d+ more have no range yet: no token reached them; call llmqat\.observe_act"
    with pytest.raises(LlmqatError, match=message):
        save_packed(model, tmp_path)
    assert not list(tmp_path.iterdir())
    observe_activations(model, tokens)
    save_packed(model, tmp_path)


def test_smoothing_reaches_router_and_experts_before_they_are_split(family, tiny_moe, tokens):
    model = tiny_moe(family)
    block = next(block for block in model.model.layers if is_fused(getattr(block.mlp, "experts", block)))
    norm, router, fused = block.post_attention_layernorm, block.mlp.gate, block.mlp.experts
    with torch.no_grad():
        norm.weight[3] *= 30
    before = norm.weight.clone(), router.weight.clone(), fused.gate_up_proj.clone()
    changes = smooth(model, tokens, 0.5)
    assert max(site.change for site in changes.values()) <= TOLERANCE
    s = before[0] / norm.weight
    assert s[3] > 1
    assert torch.equal(router.weight, before[1] * s)
    prepare(model, QuantScheme(4, 16))
    gate = block.mlp.experts[2].gate_proj
    assert torch.equal(gate.weight, (before[2] * s)[2, : gate.out_features])
