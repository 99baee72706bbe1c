"""GPTQ, AWQ and MLX checkpoints decode, by readers written from what they say of themselves, to the trained weights."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llmqat.errors import LlmqatError
from llmqat.formats.export.mlx import rotary_entries
from llmqat.formats.reader import load_packed
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline.export import export
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme

AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # AutoAWQ's own spelling: where each column of a word is found


def bit_stream(words, bits):
    """Integers ``(rows, n)`` of int32 ``(rows, words)``, each after the other from the lowest bit."""
    stream = np.unpackbits(np.ascontiguousarray(words).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : stream.shape[1] // bits * bits].reshape(len(words), -1, bits) @ (1 << np.arange(bits))


def gptq_weight(tensors, name, config):
    """``(out, in)`` by the columns' own groups."""
    codes = bit_stream(tensors[f"{name}.qweight"].numpy().T, config["bits"])
    zero = bit_stream(tensors[f"{name}.qzeros"].numpy(), config["bits"])
    zero = zero + (config["checkpoint_format"] == "gptq")
    groups, scale = tensors[f"{name}.g_idx"].numpy(), tensors[f"{name}.scales"].numpy().astype(np.float32)
    return (codes - zero[groups].T) * scale[groups].T


def awq_weight(tensors, name, config):
    """``(out, in)``."""

    def columns(words):
        nibbles = words.numpy().view(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        return nibbles[..., AWQ_ORDER].reshape(len(words), -1).astype(np.int32)

    codes, zero = columns(tensors[f"{name}.qweight"]), columns(tensors[f"{name}.qzeros"])
    groups = np.arange(len(codes)) // (len(codes) // len(zero))
    scale = tensors[f"{name}.scales"].numpy().astype(np.float32)
    return ((codes - zero[groups]) * scale[groups]).T


def mlx_weight(tensors, name, config):
    """``(out, in)`` in float32."""
    grid = config.get(name, config)
    codes = bit_stream(tensors[f"{name}.weight"].numpy(), grid["bits"])
    scale, bias = (
        tensors[f"{name}.{part}"].float().numpy().repeat(grid["group_size"], 1) for part in ("scales", "biases")
    )
    return codes * scale + bias


READERS = {
    "gptq": ("quantization_config", gptq_weight),
    "awq": ("quantization_config", awq_weight),
    "mlx": ("quantization", mlx_weight),
}
CASES = [
    *(("gptq", bits, 32, symmetric) for bits, symmetric in ((2, True), (3, False), (4, True), (4, False), (8, True))),
    ("gptq", 4, -1, True),
    ("awq", 4, 32, True),
    ("awq", 4, 16, False),
    *(("mlx", bits, 32, True) for bits in (2, 3, 8)),
]


@pytest.mark.parametrize(("to", "bits", "group_size", "symmetric"), CASES)
def test_weights_bit_for_bit(packed_dir, tmp_path, to, bits, group_size, symmetric):
    source = packed_dir(QuantScheme(bits, group_size, symmetric))
    export(source, to, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    key, weight_of = READERS[to]
    config = json.loads((tmp_path / "out" / "config.json").read_text())[key]
    for name, layer in load_packed(source).named_modules():
        if isinstance(layer, PackedLinear):
            codes, scale, zero_point = layer.unpack()
            exact = dequantize(codes, scale.float(), zero_point, layer.scheme)
            assert np.array_equal(weight_of(tensors, name, config), exact.numpy()), name
    packed = load_file(source / "model.safetensors")
    floats = [name for name in packed if "_proj" not in name]
    assert all(torch.equal(tensors[name], packed[name]) for name in floats)


def test_biases(packed_dir, tiny, tmp_path):
    source = packed_dir(QuantScheme(4, 32), model=tiny("qwen2"))
    packed = load_file(source / "model.safetensors")
    for to in READERS:
        export(source, to, tmp_path / to)
        tensors = load_file(tmp_path / to / "model.safetensors")
        assert torch.equal(
            tensors["model.layers.0.self_attn.q_proj.bias"], packed["model.layers.0.self_attn.q_proj.bias"]
        )


def test_mlx_is_told_the_rotary_embedding_by_names_that_it_reads(packed_dir, tiny, tmp_path):
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
    full = {"rope_type": "llama3", "rope_theta": 1234.0, "partial_rotary_factor": 1.0, **scaling}
    kinds = {
        "full_attention": {"rope_type": "default", "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    said = []
    for index, (family, rope) in enumerate({"llama": full, "gemma3_text": kinds}.items()):
        source = packed_dir(QuantScheme(4, 32), model=tiny(family, rope_parameters=rope))
        export(source, "mlx", tmp_path / f"out{index}")
        said.append(json.loads((tmp_path / f"out{index}" / "config.json").read_text()))
    assert (said[0]["rope_theta"], said[0]["partial_rotary_factor"]) == (1234.0, 1.0)
    assert said[0]["rope_scaling"].items() >= {"rope_type": "llama3", **scaling}.items()
    assert (said[1]["rope_theta"], said[1]["rope_local_base_freq"]) == (5e5, 1e4)
    assert "rope_scaling" not in said[1]
    assert rotary_entries(tiny("opt").config) == {}


def test_mlx_has_several_grids_and_a_tied_head(packed_dir, tiny_llama, tmp_path):
    overrides = {"down_proj$": {"bits": 8}, "layers.0.*o_proj$": "float"}
    model = tiny_llama(tie_word_embeddings=True)
    source = packed_dir(QuantScheme(4, 32), model=model, overrides=overrides, lm_head_bits=8)
    export(source, "mlx", tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]
    assert (config["bits"], config["model.layers.1.mlp.down_proj"]) == (4, {"group_size": 32, "bits": 8})
    assert tensors["model.layers.0.self_attn.o_proj.weight"].dtype == torch.bfloat16
    codes, scale, _ = load_packed(source).lm_head.unpack()
    exact = dequantize(codes, scale.float(), None, QuantScheme(8, 32))
    assert np.array_equal(mlx_weight(tensors, "model.embed_tokens", config), exact.numpy())


def test_awq_names_what_is_float(packed_dir, tmp_path):
    source = packed_dir(QuantScheme(4, 32), overrides={"layers.0.*o_proj$": "float"})
    export(source, "awq", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["modules_to_not_convert"] == ["model.layers.0.self_attn.o_proj", "lm_head"]


@pytest.mark.parametrize(
    ("to", "options", "message"),
    [
        (
            "gptq",
            {"overrides": {"down_proj$": {"bits": 8}}},
            "gptq cannot hold several grids, and this model has W4",
        ),
        (
            "gptq",
            {"overrides": {"o_proj$": "float"}},
            r"cannot hold float linear layers of the blocks, and model.* are",
        ),
        (
            "mlx",
            {"symmetric": False},
            "mlx cannot hold .* W4A16 g32 asymmetric; train with --bits 4 --group-size 32; or exp",
        ),
        ("awq", {"bits": 8}, "awq cannot hold .* W8A16 g32 symmetric; train with --bits 4 --group-size 32$"),
    ],
)
def test_what_they_do_not_hold(packed_dir, tmp_path, to, options, message):
    scheme = QuantScheme(options.pop("bits", 4), 32, options.pop("symmetric", True))
    with pytest.raises(LlmqatError, match=message):
        export(packed_dir(scheme, **options), to, tmp_path / "out")


def test_rows_that_fill_no_words(packed_dir, tiny_llama, tmp_path):
    model = tiny_llama(intermediate_size=80)
    message = r"gate_proj without loss: it has 80 rows, no multiple of 32; keep it float with an override"
    with pytest.raises(LlmqatError, match=message):
        export(packed_dir(QuantScheme(4, 16), model=model), "gptq", tmp_path / "out")
