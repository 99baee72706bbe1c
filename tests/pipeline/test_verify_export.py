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
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.pipeline.export import export
from llmqat.pipeline.verify_export import verify_export
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


def change(path, **tensors):
    """Change tensors of a safetensors file; None removes one."""
    found = load_file(path)
    for name, make in tensors.items():
        key = next(key for key in found if key.endswith(name.replace("__", ".")))
        found[key] = make(found[key])
    save_file({key: value for key, value in found.items() if value is not None}, path, metadata={"format": "pt"})


def edit(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


DAMAGE = {
    "group index": (
        lambda out: change(out / "model.safetensors", q_proj__g_idx=lambda t: t.flip(0)),
        r"holds other numbers in model\.layers\.0\.self_attn\.q_proj\.g_idx",
    ),
    "code": (
        lambda out: change(out / "model.safetensors", up_proj__qweight=lambda t: t ^ 1),
        "other numbers in .*qw",
    ),
    "lost": (lambda out: change(out / "model.safetensors", up_proj__scales=lambda t: None), r"lacks .*up_proj\.scales"),
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
    assert check.differences[0].startswith("holds other numbers in blk.0.attn_k.weight, blk.0.attn_output.weight")
    assert "llama.attention.layer_norm_rms_epsilon" in check.differences[1]
    cut(tmp_path / "out" / "model.gguf")
    with pytest.raises(LlmqatError, match=r"cannot read model file .*model\.gguf: .*; copy or download it again"):
        verify_export(tmp_path / "out", packed)
