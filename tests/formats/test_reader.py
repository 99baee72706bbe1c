"""Reading packed directories: by llmqat, by transformers, and when they are broken."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats import writer
from llmqat.formats.reader import is_packed, load_packed, read_config
from llmqat.formats.verify import dense_copy
from llmqat.formats.writer import save_packed
from llmqat.models.foreign import local_directory
from llmqat.models.patcher import prepare, quantized_layers, transformers_model
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme

IDS = torch.arange(24).view(2, 12)
INT4 = QuantScheme(4, 16)


def edit_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def edit_tensors(directory, edit):
    """Apply `edit` to the dict of tensors of a directory."""
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def qwen2():
    """Random, with biases in q, k and v."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=32,
        initializer_range=0.15,
    )
    model = Qwen2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        (INT4, {}),
        (QuantScheme(4, -1), {}),
        (QuantScheme(8, 16), {}),
        (INT4, {"mode": "lora"}),
        (INT4, {"model": "tied"}),
        (INT4, {"model": "qwen2"}),
        (INT4, {"overrides": {"down_proj$": {"bits": 8}, "o_proj$": "float"}}),
        (QuantScheme(4, 16, False), {}),
        (QuantScheme(8, -1, False), {}),
    ],
    ids=["int4", "int4-channel", "int8", "lora", "tied", "qwen2", "mixed", "int4-asym", "int8-asym-channel"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_transformers_reads_it(trained, small_llama, tmp_path, scheme, options, dtype):
    """Equal weights in every layer, and equal logits of dense weights in float32, zero points or not."""
    models = {"tied": lambda: small_llama(tie_word_embeddings=True), "qwen2": qwen2}
    options = options | ({"model": models[options["model"]]()} if "model" in options else {})
    model = trained(scheme, dtype, **options)
    directory = save_packed(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    assert theirs.dtype == dtype
    with torch.no_grad():
        logits = theirs(input_ids=IDS).logits  # the default route decompresses at the first forward
        if dtype == torch.float32:
            assert torch.equal(logits, dense_copy(load_packed(directory), dtype)(input_ids=IDS).logits)
        torch.testing.assert_close(logits, load_packed(directory)(input_ids=IDS).logits, rtol=3e-2, atol=3e-2)
    quantized = dict(load_packed(directory).named_modules())
    for name, layer, _ in quantized_layers(model):
        packed, linear = quantized[name], theirs.get_submodule(name)
        expected = packed(torch.eye(layer.in_features, dtype=dtype)).T
        if packed.bias is not None:
            assert torch.equal(linear.bias, packed.bias)
            expected = (packed(torch.eye(layer.in_features).double()) - packed.bias).T.to(dtype)
        assert torch.equal(linear.weight, expected), name
    root = transformers_model(model)
    assert torch.equal(theirs.model.embed_tokens.weight, root.model.embed_tokens.weight.to(dtype))
    assert torch.equal(theirs.lm_head.weight, root.lm_head.weight.to(dtype))
    tied = getattr(model.config, "tie_word_embeddings", False)
    assert (theirs.lm_head.weight is theirs.model.embed_tokens.weight) == tied


def test_transformers_runs_static_activations(small_llama, tmp_path):
    """With the scales in the file: other inputs than the calibrated ones clip alike."""
    model = small_llama()
    prepare(model, QuantScheme(8, -1, act_bits=8, act_static=True), calibration=[IDS[:, :6]])
    directory = save_packed(model, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        logits = theirs(input_ids=IDS).logits
        torch.testing.assert_close(logits, model(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)
        ours = load_packed(directory)(input_ids=IDS).logits
        torch.testing.assert_close(ours, logits, rtol=1e-3, atol=1e-3)
        for _, layer, _ in quantized_layers(model):
            layer.act_scale *= 1.5
        assert (model(input_ids=IDS).logits - logits).abs().max() > 3e-3, "the scale matters that much"


@pytest.mark.parametrize("overrides", [None, {"down_proj$": {"bits": 8}}], ids=["int4", "mixed"])
def test_no_dense_weight_is_ever_made(trained, tmp_path, monkeypatch, overrides):
    model = trained(INT4, overrides=overrides)
    directory = save_packed(model, tmp_path)
    for function in ("ops.dequantize", "packed.unpack_rows"):
        monkeypatch.setattr(f"llmqat.kernels.{function}", lambda *_: pytest.fail("loading made a dense weight"))
    loaded = load_packed(directory)
    assert [name for name, module in loaded.named_modules() if isinstance(module, nn.Linear)] == ["lm_head"]
    packed = [module for module in loaded.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 7
    for module in packed:
        assert not list(module.parameters())
        bits = module.scheme.bits
        assert max(t.numel() for t in module.buffers()) == module.in_features * module.out_features * bits // 32


def test_dtype_changes_float_parts_only(packed):
    _, directory = packed
    stored, wide = load_packed(directory), load_packed(directory, torch.float32)
    assert not wide.training
    assert wide.model.norm.weight.dtype == wide.lm_head.weight.dtype == torch.float32
    for model in (stored, wide, stored.float()):
        assert model.model.layers[0].mlp.up_proj.weight_scale.dtype == torch.bfloat16


def test_generates(packed):
    model, directory = packed
    loaded = load_packed(directory)
    assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 16)
    assert loaded.generation_config.eos_token_id == model.generation_config.eos_token_id


def test_is_packed(packed, model_dir):
    assert is_packed(packed[1])
    assert not is_packed(model_dir)
    edit_json(packed[1] / "config.json", quantization_config=None)
    assert not is_packed(packed[1])
    assert read_config(packed[1])["model_type"] == "llama"


def test_hub_names(monkeypatch, packed):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: {"org/x": str(packed[1])}[name])
    assert local_directory("org/x") == packed[1]
    with pytest.raises(LlmqatError, match="model org/y is neither a local directory nor a Hub repository that can be"):
        local_directory("org/y")


def drop(name):
    return lambda directory: edit_tensors(directory, lambda tensors: tensors.pop(name))


def resize(name, *shape):
    def edit(tensors):
        tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)

    return lambda directory: edit_tensors(directory, edit)


def write_config(text):
    return lambda directory: (directory / "config.json").write_text(text)


def config_with(**values):
    return lambda directory: edit_json(directory / "config.json", **values)


UP, NORM = "model.layers.0.mlp.up_proj", "model.norm.weight"


DAMAGE = {
    "no config": (lambda d: (d / "config.json").unlink(), r"has no readable config\.json; is it a model directory\?"),
    "half a config": (write_config("{"), r"config\.json is damaged \(.* in line 1\); write the model again"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), r"lacks model\.safetensors; copy the directory again"),
    "empty": (
        lambda d: (d / "model.safetensors").write_bytes(b""),
        r"model\.safetensors is damaged \(.*\); copy it again",
    ),
    "method": (
        config_with(quantization_config={"quant_method": "gptq"}),
        "quantization 'gptq' in format None is not compr",
    ),
    "float model": (
        config_with(quantization_config=None),
        "quantization None in format None is not compressed-tensors",
    ),
    "quantization": (config_with(quantization_config=[1]), r"quantization_config is no mapping; copy it again"),
    "list": (write_config("[]"), r"config\.json is damaged \(no mapping\); write the model again"),
    "deep": (write_config("[" * 100_000), r"config\.json is damaged \(.*\); write the model again"),
    "cache": (config_with(llmqat={"kv_bits": "8"}), r"llmqat says .*, and not \{'kv_bits': 8\}; copy it again"),
    "cache bits": (config_with(llmqat={"kv_bits": 4}), "kv_bits must be 8, or left out for a float cache; got 4"),
    "no norm": (drop(NORM), rf"lacks {NORM}; its weights and config\.json do not belong together"),
    "no scale": (drop(f"{UP}.weight_scale"), rf"lacks {UP}\.weight_scale; .* do not belong together"),
    "no codes": (drop(f"{UP}.weight_packed"), r"do not belong together"),
    "more layers": (config_with(num_hidden_layers=2), r"lacks model\.layers\.1\..*do not belong together"),
    "fewer layers": (config_with(num_hidden_layers=0), r"model\.layers\.0\..*do not belong together"),
    "width": (config_with(intermediate_size=96), r"tensors do not fit config\.json: .*size mismatch"),
    "shape": (resize(NORM, 7), r"tensors do not fit config\.json: size mismatch for model\.norm\.weight"),
    "class": (config_with(architectures=["NoSuchModel"]), r"cannot use .*config\.json: .*NoSuchModel"),
    "no class": (config_with(architectures=None), r"cannot use .*config\.json: .*architectures"),
    "type": (config_with(model_type="foo"), r"cannot use .*config\.json: .*foo"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(packed, kind):
    _, directory = packed
    damage, message = DAMAGE[kind]
    damage(directory)
    with pytest.raises(LlmqatError, match=message) as caught:
        load_packed(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [7, 200, -1])
def test_truncated_file(packed, keep):
    path = packed[1] / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(
        LlmqatError, match=rf"{re.escape(str(path))} is damaged \(.*\); copy it again, or write the model"
    ):
        load_packed(packed[1])


def test_missing_shard(packed, monkeypatch, tmp_path):
    monkeypatch.setattr(writer, "MAX_SHARD_SIZE", 4000)
    directory = save_packed(packed[0], tmp_path / "sharded")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(LlmqatError, match=f"lacks {shard.name}; copy the directory again, or write the model again"):
        load_packed(directory)
    (directory / "model.safetensors.index.json").write_text("{")
    with pytest.raises(LlmqatError, match=r"model\.safetensors\.index\.json is damaged; copy it again"):
        load_packed(directory)


def test_mixed_up_directories(packed, trained, tmp_path):
    """The config of one run beside the weights of another."""
    other = save_packed(trained(QuantScheme(8, 16)), tmp_path / "other")
    shutil.copy(other / "config.json", packed[1] / "config.json")
    with pytest.raises(LlmqatError, match=r"tensors do not fit config\.json: size mismatch for .*weight_packed"):
        load_packed(packed[1])
