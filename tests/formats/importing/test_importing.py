"""Checkpoints of others become packed directories with their codes and scales, or one line says why not."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llmqat.errors import LlmqatError
from llmqat.formats.importing.gguf import INTEGERS
from llmqat.formats.importing.grids import FoundLayer
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline.export import export
from llmqat.pipeline.import_checkpoint import import_checkpoint
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme


@pytest.fixture(scope="module")
def packed(tiny, merging_tokenizer, tmp_path_factory):
    """``packed(scheme, family)``: a random model on a grid."""

    def make(scheme, family="llama"):
        model = tiny(family, vocab_size=264)
        prepare(model, scheme, storage_dtype=torch.bfloat16)
        return save_packed(model, tmp_path_factory.mktemp("packed") / "packed", merging_tokenizer)

    return make


def layers_of(directory):
    modules = load_packed(directory, native=False).named_modules()
    return {name: module for name, module in modules if isinstance(module, PackedLinear)}


CASES = [
    ("gptq", QuantScheme(4, 32), "qwen2"),  # with biases
    ("gptq", QuantScheme(3, 32, False), "llama"),
    ("gptq", QuantScheme(8, -1), "llama"),
    ("awq", QuantScheme(4, 32), "llama"),
    ("awq", QuantScheme(4, 32, False), "llama"),
    ("gguf", QuantScheme(4, 32), "llama"),
    ("gguf", QuantScheme(8, 32), "qwen2"),
    ("gguf", QuantScheme(4, 32, False), "llama"),
    *(("gguf", QuantScheme(4, 32), family) for family in ("mistral", "qwen3", "phi3")),
    *(("gptq", QuantScheme(4, 32), family) for family in ("mistral", "qwen3", "gemma", "phi3")),
    ("awq", QuantScheme(4, 32, False), "gemma"),
]


@pytest.mark.parametrize(("to", "scheme", "family"), CASES)
def test_an_export_comes_back(packed, tmp_path, monkeypatch, call, capsys, to, scheme, family):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = packed(scheme, family)
    export(source, to, tmp_path / "there")
    checkpoint = tmp_path / "there" / "model.gguf" if to == "gguf" else tmp_path / "there"
    assert call(["import", checkpoint, "--output", tmp_path / "back"]) == 0
    right, found = layers_of(source), layers_of(tmp_path / "back")
    assert f"{len(right)} layers moved bit for bit, 1 linear layers float" in capsys.readouterr().out
    assert right.keys() == found.keys()
    for name, layer in found.items():
        assert layer.scheme == right[name].scheme
        for ours, theirs in zip(layer.unpack(), right[name].unpack(), strict=True):
            assert (ours is None and theirs is None) or torch.equal(ours, theirs), name
        assert layer.bias is None or torch.equal(layer.bias, right[name].bias)
    dtypes = [json.loads((directory / "config.json").read_text())["dtype"] for directory in (source, tmp_path / "back")]
    assert dtypes == ["bfloat16", "bfloat16"]
    assert verify(tmp_path / "back", logits=False).ok


def quantized_by_others(gguf, path):
    """Quantize one tensor of a file anew by the gguf package; returns its weights by that package's own code."""
    reader = gguf.GGUFReader(path, "r+")
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_up.weight")
    tensor.data[:] = gguf.quants.quantize(np.random.default_rng(0).normal(size=(96, 64)), tensor.tensor_type)
    right = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    reader.data.flush()
    return right


def test_q4_0_of_the_gguf_package(packed, tmp_path, monkeypatch):
    """Blocks that another quantizer made, decoded by its own code: scales of either sign, and of 16 bits."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(packed(QuantScheme(4, 32)), "gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    right = quantized_by_others(gguf, path)
    import_checkpoint(path, tmp_path / "back")
    layer = layers_of(tmp_path / "back")["model.layers.0.mlp.up_proj"]
    codes, scale, _ = layer.unpack()
    assert np.array_equal(dequantize(codes, scale.float(), None, layer.scheme).numpy(), right)


def test_scales_go_into_the_dtype_of_the_model_where_it_holds_them():
    layer = FoundLayer(QuantScheme(4, 32), torch.zeros(1, 32), torch.tensor([[0.125]], dtype=torch.float16), None)
    assert layer.stored_in(torch.bfloat16).scale.dtype == torch.bfloat16
    fine = layer._replace(scale=torch.tensor([[1.0009765625]], dtype=torch.float16))
    assert fine.stored_in(torch.bfloat16).scale.dtype == torch.float16


def edit(out, **values):
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= values
    (out / "config.json").write_text(json.dumps(config))


def change(out, name, make):
    tensors = load_file(out / "model.safetensors")
    tensors[f"model.layers.0.mlp.up_proj.{name}"] = make(tensors[f"model.layers.0.mlp.up_proj.{name}"])
    kept = {key: value.contiguous() for key, value in tensors.items() if value is not None}
    save_file(kept, out / "model.safetensors", metadata={"format": "pt"})


def cut(out):
    data = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(data[:-100])


def lose_a_shard(out):
    names = dict.fromkeys(load_file(out / "model.safetensors"), "model-00001-of-00002.safetensors")
    weight_map = names | {"model.norm.weight": "model-00002-of-00002.safetensors"}
    (out / "model.safetensors").rename(out / "model-00001-of-00002.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def another_family(out):
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"model_type": "llama9"}))


def another_tokenizer(out):
    tokenizer = AutoTokenizer.from_pretrained(out)
    tokenizer.add_tokens([f"<{index}>" for index in range(9)])
    tokenizer.save_pretrained(out)


def no_tokenizer(out):
    for path in out.glob("tokenizer*"):
        path.unlink()


def unquantized(out):
    save_file({"model.norm.weight": torch.ones(64)}, out / "model.safetensors", metadata={"format": "pt"})


BROKEN = {
    "order": (
        lambda out: change(out, "g_idx", lambda t: t.flip(0)),
        r"up_proj\.g_idx does not put neighbours into group",
    ),
    "length": (
        lambda out: change(out, "g_idx", lambda t: t[1:].clone()),
        r"g_idx is int32 \[63\], and has to be int32 or",
    ),
    "zero": (
        lambda out: change(out, "qzeros", lambda t: t | 15),
        r"up_proj holds a zero point of 16, which version 1 of",
    ),
    "part": (
        lambda out: change(out, "scales", lambda t: None),
        r"the checkpoint lacks .*up_proj\.scales; copy or downl",
    ),
    "dtype": (
        lambda out: change(out, "qweight", lambda t: t.float()),
        r"up_proj\.qweight is float32 \[8, 96\], and has ",
    ),
    "groups": (
        lambda out: edit(out, group_size=16),
        "has 3 groups in rows of 96, and the config says 16 weights in each; copy",
    ),
    "bits": (lambda out: edit(out, bits=5), r"config\.json: bits is 5; llmqat has \(2, 3, 4, 8\) bits"),
    "layout": (
        lambda out: edit(out, checkpoint_format="marlin"),
        "is laid out for marlin; llmqat imports gptq and gptq_v",
    ),
    "method": (
        lambda out: edit(out, quant_method="fp8"),
        "is quantized by fp8; llmqat imports gptq, awq and GGUF files",
    ),
    "packed": (
        lambda out: edit(out, quant_method="compressed-tensors"),
        "is compressed-tensors, which llmqat loads, run",
    ),
    "awq": (
        lambda out: edit(out, quant_method="awq", version="gemv"),
        "is of version gemv with 4 bits; llmqat imports ve",
    ),
    "cut": (cut, r"model\.safetensors is damaged"),
    "shard": (lose_a_shard, r"model-00002-of-00002\.safetensors.*; "),
    "family": (
        another_family,
        r"config\.json: this transformers has no model type 'llama9', or .*; install a newer one, or copy the ch",
    ),
    "another tokenizer": (
        another_tokenizer,
        "has tokens up to 268, and the model an embedding of 264: it is that of another model; copy the files of the",
    ),
    "no tokenizer": (
        no_tokenizer,
        "has no tokenizer that transformers can load; copy the files of the model's own there",
    ),
    "float": (unquantized, "holds no quantized layer; copy or download the checkpoint again"),
}


@pytest.fixture(scope="module")
def checkpoint(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    export(packed(QuantScheme(4, 32)), "gptq", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoints_are_refused_in_one_line(checkpoint, tmp_path, case):
    damage, message = BROKEN[case]
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    damage(broken)
    with pytest.raises(LlmqatError, match=message):
        import_checkpoint(broken, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_truncated_gguf_file(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(packed(QuantScheme(4, 32)), "gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(LlmqatError, match=r"cannot read model file .*model\.gguf: .*; copy or download it again"):
        import_checkpoint(path, tmp_path / "back")


def test_q5_0_of_the_gguf_package(packed, tmp_path, monkeypatch):
    """Blocks that use all 32 integers are on the symmetric grid of 8 bits, with the same weights."""
    gguf = pytest.importorskip("gguf")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(packed(QuantScheme(4, 32, False)), "gguf", tmp_path / "out")
    path = tmp_path / "out" / "model.gguf"
    right = quantized_by_others(gguf, path)
    import_checkpoint(path, tmp_path / "back")
    found = layers_of(tmp_path / "back")
    layer = found["model.layers.0.mlp.up_proj"]
    assert {other.scheme for other in found.values()} == {QuantScheme(4, 32, False), QuantScheme(8, 32)}
    codes, scale, _ = layer.unpack()
    assert np.array_equal(dequantize(codes, scale.float(), None, layer.scheme).numpy(), right)


def test_gguf_files_that_are_not_imported(packed, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    export(packed(QuantScheme(4, 32)), "gguf", tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.delitem(INTEGERS, "Q4_0")
        with pytest.raises(
            LlmqatError, match="has no layer in blocks of Q5_0, Q8_0; use it by --model, as a float model"
        ):
            import_checkpoint(tmp_path / "out" / "model.gguf", tmp_path / "back")
    monkeypatch.setattr("llmqat.formats.importing.gguf.FAMILIES", {})
    with pytest.raises(LlmqatError, match=r"is of the family llama, and llmqat imports .*; use it by --model"):
        import_checkpoint(tmp_path / "out" / "model.gguf", tmp_path / "back")
