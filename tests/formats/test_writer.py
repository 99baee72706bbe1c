"""The contract: what was trained is what is written, and what is written is what runs, bit for bit."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.formats import writer
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed, storage_dtype
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme
from tests.covering import every


def w_hat_of_forward(layer, dtype, *adapters):
    """What the layer multiplies by, seen from outside: its answer to unit vectors, exact in any dtype."""
    with torch.no_grad():
        return layer(torch.eye(layer.in_features, dtype=dtype), *adapters).T


def listing(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size", "dtype", "mode"),
    every(3, (2, 3, 4, 8), (True, False), (-1, 8, 16), (torch.bfloat16, torch.float32), ("full", "lora")),
    ids=str,
)
def test_bit_exact(trained, decode, tmp_path, bits, symmetric, group_size, dtype, mode):
    scheme = QuantScheme(bits, group_size, symmetric)
    model = trained(scheme, dtype, mode)
    directory = save_packed(model, tmp_path)
    file, loaded = decode(directory, bits, symmetric), load_packed(directory)
    layers = list(quantized_layers(model))
    assert file.keys() == {name for name, _, _ in layers}
    for name, layer, adapters in layers:
        codes, scale, zero_point, w_hat = file[name]
        assert torch.equal(codes.int(), layer.codes(adapters).int() + (1 << (bits - 1)) * symmetric), name
        assert scale.dtype == dtype
        assert torch.equal(scale, layer.stored_scale())
        if not symmetric:
            assert torch.equal(zero_point.int(), layer.stored_zero_point().int())
        # The training forward, the file and the loaded layer multiply by the same numbers.
        assert torch.equal(w_hat_of_forward(layer, dtype, adapters), w_hat), name
        packed = loaded.get_submodule(name)
        assert isinstance(packed, PackedLinear)
        assert torch.equal(w_hat_of_forward(packed, dtype), w_hat), name


def test_training_moved_what_is_packed(trained, small_llama):
    """The contract is empty if nothing moves: codes and scales both must."""
    scheme = QuantScheme(4, 16)
    before = small_llama(1)
    prepare(before, scheme)
    grids = {name: (layer.codes(), layer.stored_scale()) for name, layer, _ in quantized_layers(before)}
    for mode in ("full", "lora"):
        for name, layer, adapters in quantized_layers(trained(scheme, mode=mode, seed=1)):
            codes, scale = grids[name]
            assert not torch.equal(layer.codes(adapters), codes), (mode, name)
            assert not torch.equal(layer.stored_scale(), scale), (mode, name)


@pytest.mark.parametrize("act_bits", [None, 8])
def test_logits_of_the_loaded_model(trained, tmp_path, act_bits):
    model = trained(QuantScheme(4, 16, act_bits=act_bits), torch.bfloat16)
    ids = torch.randint(0, 64, (2, 20))
    with torch.no_grad():
        for parameter in model.parameters():  # float parts are stored in bfloat16
            if parameter.ndim == 1 or parameter.shape[0] == 64:
                parameter.copy_(parameter.bfloat16())
        expected = model(input_ids=ids).logits
        logits = load_packed(save_packed(model, tmp_path), torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_packing_leaves_the_model_alone(trained, tmp_path):
    model = trained(QuantScheme(4, 16), mode="lora")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = model.config.to_dict()
    save_packed(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.config.to_dict() == config


def test_files(packed, tokenizer, tmp_path):
    model, directory = packed
    names = {"model.safetensors", "config.json", "generation_config.json", "fingerprint.json"}
    assert {path.name for path in directory.iterdir()} == names
    save_packed(model, tmp_path / "with", tokenizer)
    assert names | {"tokenizer.json", "tokenizer_config.json"} == {path.name for path in (tmp_path / "with").iterdir()}
    with safe_open(directory / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_everything_is_stored_in_the_storage_dtype(trained, tmp_path, dtype):
    model = trained(QuantScheme(4, 16, symmetric=False), dtype)
    assert storage_dtype(model) == dtype
    dtypes = {
        name.rpartition(".")[2] if "_proj." in name else "float": tensor.dtype
        for name, tensor in load_file(save_packed(model, tmp_path) / "model.safetensors").items()
    }
    assert dtypes == {
        "float": dtype,
        "weight_packed": torch.int32,
        "weight_scale": dtype,
        "weight_shape": torch.int64,
        "weight_zero_point": torch.int32,
    }


def test_tied_head_is_stored_once(trained, small_llama, tmp_path):
    model = trained(QuantScheme(4, 16), model=small_llama(tie_word_embeddings=True))
    tensors = load_file(save_packed(model, tmp_path) / "model.safetensors")
    assert "model.embed_tokens.weight" in tensors
    assert "lm_head.weight" not in tensors
    loaded = load_packed(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, ""),
        ({"lm_head_bits": 4}, "vllm and vllm-cpu cannot hold model.embed_tokens without loss: the output head has"),
        ({"overrides": {"up_proj$": "float"}}, "vllm and vllm-cpu cannot run model.layers.0.mlp.gate_proj and"),
        ({"kv_bits": 8}, "vllm and vllm-cpu cannot run the int8 cache"),
        ({"overrides": {"_proj$": {"bits": 8}}}, "vllm-cpu cannot hold model.layers.0.self_attn.q_proj without loss"),
    ],
)
def test_packing_names_engines_that_do_not_run_it(tiny_llama, tmp_path, capsys, options, said):
    model = tiny_llama(tie_word_embeddings=True)
    prepare(model, QuantScheme(4, 32), **options)
    capsys.readouterr()
    save_packed(model, tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(lines) == bool(said)
    assert all(line.startswith(f"note: {said}") and "--to dense" in line for line in lines)


def test_unprepared_model(small_llama, tmp_path):
    with pytest.raises(
        LlmqatError, match=r"nothing to pack: no layer of this model is quantized; call llmqat\.prepare"
    ):
        save_packed(small_llama(), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_shards(packed, decode, monkeypatch, tmp_path):
    model, single = packed
    monkeypatch.setattr(writer, "MAX_SHARD_SIZE", 4000)
    directory = save_packed(model, tmp_path / "sharded")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (directory / "model.safetensors").exists()
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in shards}
    together = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    expected = load_file(single / "model.safetensors")
    assert together.keys() == expected.keys() == index["weight_map"].keys()
    assert all(torch.equal(together[name], expected[name]) for name in expected)
    ids = torch.arange(10)[None]
    assert torch.equal(load_packed(directory)(input_ids=ids).logits, load_packed(single)(input_ids=ids).logits)
    (directory / "notes.safetensors.txt").write_text("mine")
    monkeypatch.undo()  # a smaller model over it: no shard of the old one stays
    save_packed(model, directory)
    assert {path.name for path in directory.glob("*.safetensors*")} == {"model.safetensors", "notes.safetensors.txt"}


@pytest.mark.parametrize("culprit", ["save_file", "packed_config", "fingerprint.write"])
def test_a_failed_write_leaves_the_old_files(packed, trained, monkeypatch, culprit):
    _, directory = packed
    before = listing(directory)

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device") if culprit == "save_file" else RuntimeError("bug")

    monkeypatch.setattr(f"llmqat.formats.writer.{culprit}", fail)
    message = "cannot write to .*: No space left on device; free some space" if culprit == "save_file" else "bug"
    with pytest.raises((LlmqatError, RuntimeError), match=message):
        save_packed(trained(QuantScheme(8, 16)), directory)
    assert listing(directory) == before
    assert not list(directory.glob(".partial-*"))


def test_replacing_keeps_foreign_files_and_weights(packed):
    _, directory = packed
    before = listing(directory)
    with replacing(directory) as scratch:
        (scratch / "report.json").write_text("{}")
    assert listing(directory) == {**before, "report.json": b"{}"}


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(LlmqatError, match=r"cannot write to .*: Not a directory; choose another --output"),
        replacing(tmp_path / "file" / "below"),
    ):
        pass


def test_files_are_as_readable_as_any(packed):
    """A model served by another user must be readable: no file keeps the permissions of a temporary one."""
    _, directory = packed
    plain = directory / "plain"
    plain.write_text("")
    modes = {path.name: oct(path.stat().st_mode) for path in directory.iterdir()}
    assert set(modes.values()) == {oct(plain.stat().st_mode)}, modes


def test_rotary_frequencies_keep_float32(packed):
    """`model.to(torch.bfloat16)` would round them, and logits with them."""
    _, directory = packed
    loaded = load_packed(directory)
    assert loaded.dtype == torch.bfloat16
    inv_freq = loaded.model.rotary_emb.inv_freq
    plain = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in loaded.config.to_dict().items() if k != "dtype"}))
    assert inv_freq.dtype == torch.float32
    assert torch.equal(inv_freq, plain.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "holds NaN or infinity"), (7e4, "reaches 7e.04, and float16 h")]
)
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_float_parts_that_cannot_be_stored_are_refused(tiny_llama, tmp_path, name, value, message):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 16), storage_dtype=torch.float16)
    model.get_parameter(name).data.view(-1)[3] = value
    with pytest.raises(LlmqatError, match=f"^{name} {message}"):
        save_packed(model, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
