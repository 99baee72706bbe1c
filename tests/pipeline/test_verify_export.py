"""An export is its packed directory, or one line says what is not."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.errors import LlmqatError
from llmqat.formats.export.compare import format_of
from llmqat.formats.export.holds import HOLDS
from llmqat.formats.export.mlx import mlx_layer
from llmqat.formats.export.source import Source
from llmqat.formats.importing.exported import decoder_of, layer_differences
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.pipeline.export import WRITERS, export
from llmqat.pipeline.verify_export import verify_export
from llmqat.quant.affine import dequantize
from llmqat.quant.packing import pack_rows
from llmqat.scheme import QuantScheme


@pytest.fixture(scope="module")
def packed(tiny, merging_tokenizer, tmp_path_factory):
    model = tiny("llama", vocab_size=264)
    prepare(model, QuantScheme(4, 32), storage_dtype=torch.bfloat16)
    return save_packed(model, tmp_path_factory.mktemp("packed") / "packed", merging_tokenizer)


@pytest.mark.parametrize("to", HOLDS)
def test_every_format(packed, tmp_path, to, call, capsys):
    export(packed, to, tmp_path / "out")
    assert format_of(tmp_path / "out") == to
    assert call(["verify", tmp_path / "out", "--against", packed, "--json", tmp_path / "said.json"]) == 0
    assert "all equal        True" in capsys.readouterr().out
    assert json.loads((tmp_path / "said.json").read_text())["ok"] is True


def double(tensor):
    return tensor * 2


def with_other_biases(layer):
    made = mlx_layer(layer)
    return made | {"biases": double(made["biases"])}


# Faults of a writer, and what is said of them: an export by the same writer has them too.
BROKEN_WRITERS = {
    "gptq": ("pack_rows", lambda codes, bits: pack_rows(codes.flip(0), bits), "codes"),
    "awq": ("ORDER", tuple(range(8)), "codes"),
    "mlx": ("mlx_layer", with_other_biases, "zero points"),
    "gguf": ("swap_halves", lambda rows, heads: rows, "codes"),
    "dense": ("dequantize", lambda codes, scale, *grid: dequantize(codes, double(scale), *grid), "weights"),
}


@pytest.mark.parametrize("to", BROKEN_WRITERS)
def test_a_broken_writer(packed, tmp_path, monkeypatch, to):
    name, broken, what = BROKEN_WRITERS[to]
    monkeypatch.setattr(f"llmqat.formats.export.{to}.{name}", broken)
    export(packed, to, tmp_path / "out")
    (line,) = verify_export(tmp_path / "out", packed).differences
    assert line.startswith(f"holds other {what} in model.layers.0.self_attn.q_proj, ")
    assert re.search(r" of \d+: .* at \[\d+, \d+\] where .* was packed, and others in \d+ more layers$", line)


CASES = {
    "fifth bits": ("gguf", QuantScheme(4, 32, symmetric=False), "qwen2", {}),
    "bytes": ("gguf", QuantScheme(8, -1), "llama", {}),
    "version 2": ("gptq", QuantScheme(3, 32, symmetric=False), "qwen2", {}),
    "zero points": ("awq", QuantScheme(4, 16, symmetric=False), "llama", {}),
    "several grids": ("mlx", QuantScheme(4, 32), "llama", {"overrides": {"down_proj$": {"bits": 8}}}),
    "tied head": ("mlx", QuantScheme(4, 32), "llama", {"lm_head_bits": 8}),
    "fused experts": ("dense", QuantScheme(4, 16, symmetric=False), "gpt_oss", {}),
    "experts": ("dense", QuantScheme(2, 16), "mixtral", {}),
    "Conv1D": ("dense", QuantScheme(8, 32), "gpt2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_decoded_layers(tiny, tiny_moe, merging_tokenizer, tmp_path, case):
    """Equal as they are, and one that is not is found, whatever its layout."""
    to, scheme, family, options = CASES[case]
    sizes = {"vocab_size": 264, "tie_word_embeddings": case == "tied head"}
    model = tiny_moe(family, **sizes) if "experts" in case else tiny(family, **sizes)
    prepare(model, scheme, storage_dtype=torch.bfloat16, **options)
    source = Source.open(save_packed(model, tmp_path / "packed", merging_tokenizer))
    (tmp_path / "out").mkdir()
    WRITERS[to](source, tmp_path / "out")
    decoder = decoder_of(tmp_path / "out", to, source)
    assert layer_differences(decoder) == ()
    assert len(decoder.layers) == len(source.layers)
    for path, layer in list(source.layers.items())[::5]:  # of experts gate, down and up
        layer.weight_packed[-1, 0] ^= 1
        (line,) = layer_differences(decoder)
        what = "weights" if to == "dense" else "codes"
        assert line.startswith(f"holds other {what} in {source.file_name(path)}, 1 of ")
        layer.weight_packed[-1, 0] ^= 1


def test_rounded_numbers_are_compared_as_rounded(tiny, tmp_path):
    model = tiny("llama")
    prepare(model, QuantScheme(4, 32, symmetric=False), storage_dtype=torch.float32)
    packed = save_packed(model, tmp_path / "packed")
    for to, what in (("mlx", "zero points"), ("gptq", "scales")):
        export(packed, to, tmp_path / to, allow_rounding=True)
        check = verify_export(tmp_path / to, packed)
        assert (check.ok, check.rounded) == (True, True)
        part = "up_proj__biases" if to == "mlx" else "up_proj__scales"
        change(tmp_path / to / "model.safetensors", **{part: lambda t: nudged(t)})
        assert verify_export(tmp_path / to, packed).differences[0].startswith(f"holds other {what} in ")


def nudged(tensor):
    """The first number moved to the next one of its dtype."""
    return torch.cat([tensor.view(-1)[:1].nextafter(tensor.new_tensor([9.0])), tensor.view(-1)[1:]]).view(tensor.shape)


def change(path, **tensors):
    """Change tensors of a safetensors file; None removes one, and a name that it lacks is a new one."""
    found = load_file(path)
    for name, made in tensors.items():
        key = next((key for key in found if key.endswith(name.replace("__", "."))), name)
        found[key] = made(found.get(key))
    save_file({key: value for key, value in found.items() if value is not None}, path, metadata={"format": "pt"})


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def flipped(tensor, bits):
    """Bits of the first number changed."""
    changed = tensor.clone()
    changed.view(-1)[0] ^= bits
    return changed


DAMAGE = {
    "group index": (
        lambda out: change(out / "model.safetensors", q_proj__g_idx=lambda t: t.flip(0)),
        r"it cannot be read: model\.layers\.0\.self_attn\.q_proj\.g_idx does not put neighbours into groups",
    ),
    "code": (
        lambda out: change(out / "model.safetensors", up_proj__qweight=lambda t: flipped(t, 1 << 8)),
        r"other codes in model\.layers\.\d\.mlp\.up_proj, 1 of 6144: \d+ at \[0, 2\] where \d+ was packed; export that",
    ),
    "scale": (
        lambda out: change(out / "model.safetensors", up_proj__scales=lambda t: t * torch.arange(1, 97)),
        r"other scales in model\.layers\.\d\.mlp\.up_proj, 190 of 192: .* at \[1, 0\] where .* was packed; export that",
    ),
    "zero": (
        lambda out: change(out / "model.safetensors", up_proj__qzeros=lambda t: flipped(t, 1)),
        r"other zero points in model\.layers\.\d\.mlp\.up_proj, 1 of 192: 7 at \[0, 0\] where 8 was packed; exp",
    ),
    "lost": (
        lambda out: change(out / "model.safetensors", up_proj__scales=lambda t: None),
        r"cannot be read: the checkpoint lacks .*up_proj\.scales",
    ),
    "float": (
        lambda out: change(out / "model.safetensors", model__norm__weight=lambda t: t * 2),
        r"it holds other numbers in model\.norm\.weight; export",
    ),
    "more": (
        lambda out: change(out / "model.safetensors", model__norm__weight=lambda t: None, more=lambda t: torch.ones(1)),
        r"it lacks model\.norm\.weight; it holds more, which the packed model does not have",
    ),
    "tokenizer": (
        lambda out: edit(out / "tokenizer.json", version="2"),
        r"has another tokenizer, by tokenizer\.json; export",
    ),
    "config": (lambda out: edit(out / "config.json", rms_norm_eps=0.1), "is another model, by rms_norm_eps; export"),
    "file": (lambda out: (out / "model.safetensors").unlink(), r"lacks model\.safetensors; copy the directory again"),
    "cut": (lambda out: cut(out / "model.safetensors"), r"model\.safetensors is damaged"),
    "other": (lambda out: edit(out / "config.json", quantization_config={"quant_method": "fp8"}), "is a fp8 model, wh"),
    "list": (lambda out: (out / "config.json").write_text("[]"), r"config\.json is damaged; export the model again"),
    "nothing": (lambda out: (out / "config.json").unlink(), r"holds no exported model: neither model\.gguf nor a conf"),
}


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def gptq(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gptq")
    export(packed, "gptq", folder / "out")
    return folder / "out"


@pytest.mark.parametrize("case", DAMAGE)
def test_each_kind_of_damage_is_one_line(packed, gptq, tmp_path, case, call, capsys):
    damage, message = DAMAGE[case]
    out = shutil.copytree(gptq, tmp_path / "out")
    damage(out)
    assert call(["verify", out, "--against", packed]) == 1
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_a_gguf_file_of_another_model_and_one_that_is_cut(packed, tiny, merging_tokenizer, tmp_path):
    model = tiny("llama", vocab_size=264, rms_norm_eps=1e-3)
    prepare(model, QuantScheme(8, 32), storage_dtype=torch.bfloat16)
    export(save_packed(model, tmp_path / "other", merging_tokenizer), "gguf", tmp_path / "out")
    check = verify_export(tmp_path / "out", packed)
    assert not check.ok
    assert check.differences[0].startswith("holds other codes in model.layers.0.self_attn.q_proj, ")
    assert "llama.attention.layer_norm_rms_epsilon" in check.differences[-1]
    cut(tmp_path / "out" / "model.gguf")
    with pytest.raises(LlmqatError, match=r"cannot read model file .*model\.gguf: .*; copy or download it again"):
        verify_export(tmp_path / "out", packed)
