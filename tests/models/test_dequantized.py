"""Checkpoints in MXFP4 and FP8, as gpt-oss, DeepSeek, Mistral and Qwen come, dequantized as transformers does it."""

import json
import re
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DeepseekV4Config,
    FineGrainedFP8Config,
    GptOssConfig,
    Ministral3Config,
    Mxfp4Config,
    Qwen3Config,
)

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.formats.mapped_model import load_mapped
from llmqat.mapped import Disk
from llmqat.models import dequantized
from llmqat.models.experts import split_experts
from llmqat.models.loading import load_empty, load_float, resolve_weights, stored_format
from llmqat.models.quantized_files import dequantize
from llmqat.report import plan

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 0,
    "n_group": 1,
    "topk_group": 1,
}
COMPRESSED = {
    "num_key_value_heads": 1,
    "head_dim": 32,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 32,
    "o_lora_rank": 32,
    "o_groups": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "layer_types": ["sliding_attention"],
    "mlp_layer_types": ["moe"],
}
BLOCK = 32
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def saved(config, directory, quantization, change):
    """A random model, its tensors changed by ``change(name, tensor)`` into those of a quantized checkpoint."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tensors = load_file(directory / "model.safetensors")
    quantized = {key: value for name, tensor in tensors.items() for key, value in change(name, tensor).items()}
    save_file(quantized, directory / "model.safetensors", {"format": "pt"})
    told = json.loads((directory / "config.json").read_text()) | {"quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(told))
    return directory


def in_mxfp4(name, tensor):
    if tensor.ndim < 3:
        return {name: tensor}
    experts, inputs, outputs = tensor.shape
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
    scales = torch.randint(118, 125, blocks.shape[:-1], dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": scales}


def exponents(*shape):
    return torch.randint(118, 125, shape, dtype=torch.uint8)


def in_v4(name, tensor):
    """As DeepSeek V4 Flash: scales that are exponents; experts in four bits, each with one for 32 numbers of a row."""
    layer, (rows, *columns) = name.removesuffix(".weight"), tensor.shape
    if ".experts." in name:
        codes = torch.randint(-128, 128, (rows, columns[0] // 2), dtype=torch.int8)
        return {name: codes, f"{layer}.scale": exponents(rows, columns[0] // 32).view(torch.float8_e8m0fnu)}
    if not re.search(r"attn\.w(q_.|kv|o_.)\.weight|shared_experts", name):
        return {name: tensor}
    scale = exponents(rows // BLOCK, columns[0] // BLOCK).view(torch.float8_e8m0fnu)
    return {name: torch.randn(tensor.shape).mul(9).to(torch.float8_e4m3fn), f"{layer}.scale": scale}


def in_static(name, tensor, of_weight="weight_scale_inv", of_inputs="activation_scale"):
    """As Ministral 3: a scale for each matrix, and one for its inputs."""
    if not name.endswith("_proj.weight"):
        return {name: tensor}
    layer, scale = name.removesuffix(".weight"), torch.tensor(0.013, dtype=torch.bfloat16)
    codes = torch.randn(tensor.shape).mul(9).to(torch.float8_e4m3fn)
    return {name: codes, f"{layer}.{of_weight}": scale, f"{layer}.{of_inputs}": scale.clone()}


def in_mxfp8(name, tensor):
    if not name.endswith("_proj.weight"):
        return {name: tensor}
    codes = torch.randn(tensor.shape).mul(9).to(torch.float8_e5m2)
    return {name: codes, f"{name}_scale_inv": exponents(len(tensor), tensor.shape[1] // 32)}


def in_fp8(name, tensor):
    if not re.search(r"_(a_|b_|with_mqa)?(proj|mqa)\.weight$", name):
        return {name: tensor}
    scale = torch.rand([-(-size // BLOCK) for size in tensor.shape]) / 64
    return {name: torch.randn(tensor.shape).mul(9).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


@pytest.fixture
def gpt_oss(tmp_path):
    config = GptOssConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"])
    return saved(config, tmp_path / "gpt-oss", {"quant_method": "mxfp4"}, in_mxfp4)


@pytest.fixture
def deepseek_v4(tmp_path):
    """Its config says beside the quantization that experts are in FP4."""
    directory = saved(DeepseekV4Config(**SIZES | COMPRESSED), tmp_path / "v4", FP8 | {"scale_fmt": "ue8m0"}, in_v4)
    told = json.loads((directory / "config.json").read_text()) | {"expert_dtype": "fp4"}
    (directory / "config.json").write_text(json.dumps(told))
    return directory


@pytest.fixture
def ministral3(tmp_path):
    static = FP8 | {"activation_scheme": "static", "weight_block_size": None}
    return saved(Ministral3Config(**SIZES), tmp_path / "ministral3", static, in_static)


@pytest.fixture
def mistral(tmp_path):
    names = {"of_weight": "qscale_weight", "of_inputs": "qscale_act"}
    static = FP8 | {"activation_scheme": "static", "weight_block_size": None}
    return saved(Ministral3Config(**SIZES), tmp_path / "mistral", static, partial(in_static, **names))


@pytest.fixture
def mxfp8(tmp_path):
    return saved(Qwen3Config(**SIZES), tmp_path / "mxfp8", {"quant_method": "mxfp8", "scale_fmt": "ue8m0"}, in_mxfp8)


@pytest.fixture
def qwen3(tmp_path):
    return saved(Qwen3Config(**SIZES), tmp_path / "qwen3", FP8, in_fp8)


def equals(model, other):
    own, theirs = model.state_dict(), other.state_dict()
    return own.keys() == theirs.keys() and all(torch.equal(own[name], theirs[name]) for name in own)


@pytest.mark.parametrize(
    ("kind", "config", "format_"),
    [
        ("gpt_oss", Mxfp4Config, "MXFP4"),
        ("mxfp8", FineGrainedFP8Config, "MXFP8"),
        *((kind, FineGrainedFP8Config, "FP8") for kind in ("qwen3", "deepseek_v4", "ministral3", "mistral")),
    ],
)
def test_the_float_model_is_that_of_transformers(request, monkeypatch, kind, config, format_, capsys):
    directory = request.getfixturevalue(kind)
    monkeypatch.setattr(dequantized, "SHARD_BYTES", 1 << 12)
    model = load_float(str(directory))
    assert equals(model, AutoModelForCausalLM.from_pretrained(directory, quantization_config=config(dequantize=True)))
    assert f"reading {directory} in {format_}, once: it stays dequantized in" in capsys.readouterr().err
    assert stored_format(str(directory)) == format_
    assert equals(load_float(str(directory)), model)
    assert "reading" not in capsys.readouterr().err, "it is read once"
    assert len(list((directory.parent / "cache" / "llmqat").glob("*/model-*.safetensors"))) > 2


def test_a_plan_reads_no_weights(qwen3, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "is_predictable", lambda _: False)
    said = str(plan.inspect(Recipe().with_values({"model": str(qwen3), "quant.group_size": 32})))
    assert "stored in FP8: its dequantized weights, in bfloat16, are the float model" in said.splitlines()
    assert load_empty(str(qwen3))[1] == torch.bfloat16
    assert not (tmp_path / "cache").exists()


def test_its_weights_can_stay_in_files(deepseek_v4, tmp_path):
    expected = load_float(str(deepseek_v4))
    split_experts(expected)
    assert equals(load_mapped(str(deepseek_v4), Disk(tmp_path)), expected)


def test_blocks_may_stick_out(tmp_path):
    """DeepSeek's projection of keys and values has 576 rows, in blocks of 128."""
    directory = saved(DeepseekV3Config(**SIZES | LATENT), tmp_path / "deepseek", FP8, in_fp8)
    stored = load_file(directory / "model.safetensors")
    name = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    assert stored[name].shape == (48, 64)
    assert stored[f"{name}_scale_inv"].shape == (2, 2)
    factors = torch.kron(stored[f"{name}_scale_inv"], torch.ones(BLOCK, BLOCK))[:48]
    found = load_float(str(directory)).get_parameter(name)
    assert torch.equal(found, (stored[name].float() * factors).bfloat16())


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        (
            "mlp.up_proj.weight",
            torch.zeros(96, 64, dtype=torch.int8),
            r"as I8 \[96, 64\] with scales \[3, 2\], which is",
        ),
        (
            "mlp.up_proj.weight",
            torch.zeros(96, 64),
            r"up_proj.weight as F32 \[96, 64\] with scales \[3, 2\], which is no",
        ),
        (
            "mlp.up_proj.weight_scale_inv",
            torch.ones(3, 5),
            r"as F8_E4M3 \[96, 64\] with scales \[3, 5\], which is no form",
        ),
        (
            "mlp.up_proj.weight_scale_inv",
            torch.ones(3),
            r"with scales \[3\], which is no format that is known; start from",
        ),
    ],
)
def test_what_is_in_no_known_format(qwen3, name, tensor, message):
    """Before any tensor is read, also by a plan."""
    tensors = load_file(qwen3 / "model.safetensors")
    save_file(tensors | {f"model.layers.0.{name}": tensor}, qwen3 / "model.safetensors", {"format": "pt"})
    for load in (load_float, load_empty):
        with pytest.raises(LlmqatError, match=message):
            load(str(qwen3))


def test_experts_that_share_a_tensor_have_scales_of_their_own():
    codes, scales = torch.randn(2, 4, 8).to(torch.float8_e4m3fn), torch.tensor([[[0.5]], [[2.0]]])
    assert torch.equal(dequantize(codes, scales, (4, 8)), codes.bfloat16() * scales.bfloat16())


def test_a_scale_that_is_missing(qwen3):
    tensors = load_file(qwen3 / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight_scale_inv"]
    save_file(tensors, qwen3 / "model.safetensors", {"format": "pt"})
    with pytest.raises(LlmqatError, match=r"lacks model\.layers\.0\.mlp\.up_proj\.weight_scale_inv; copy or download"):
        load_float(str(qwen3))


@pytest.mark.parametrize(
    ("method", "message"),
    [("awq", r"quantized already \(awq\); make .* by llmqat import, or"), ("bitsandbytes", "already; start from the")],
)
def test_others_are_refused_with_what_to_do(qwen3, method, message):
    config = json.loads((qwen3 / "config.json").read_text())
    (qwen3 / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    assert not stored_format(str(qwen3))
    with pytest.raises(LlmqatError, match=message):
        load_empty(str(qwen3))


def test_weights_are_resolved_by_their_name(qwen3):
    made = resolve_weights(str(qwen3))
    assert resolve_weights(made) == made != str(qwen3)
