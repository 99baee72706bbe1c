"""An export appears whole or not at all, and never in the place of anything."""

import pytest
import torch
from safetensors.torch import load_file

from llmqat.errors import LlmqatError
from llmqat.formats.export.holds import HOLDS
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.pipeline import export as exporting
from llmqat.pipeline.export import WRITERS, export
from llmqat.scheme import QuantScheme


def test_every_format_of_the_table_is_written():
    assert WRITERS.keys() == HOLDS.keys()


def test_command_line(finished, tmp_path, call, capsys):
    assert call(["export", finished, "--to", "dense", "--output", tmp_path / "out"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: dense, 14 layers moved bit for bit, ")
    assert call(["export", finished, "--to", "nothing", "--output", tmp_path / "out2"]) == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


def test_rounding_is_measured_where_it_is_allowed(tiny, tmp_path, call, capsys):
    """The minimum of MLX, scale times zero point, in the dtype of the scales; and scales of float32 in float16."""
    model = tiny("llama")
    prepare(model, QuantScheme(4, 32, symmetric=False), storage_dtype=torch.bfloat16)
    packed = save_packed(model, tmp_path / "packed")
    flags = ["export", packed, "--to", "mlx", "--output", tmp_path / "out"]
    assert call(flags) == 1
    assert "or export with --allow-rounding, which measures what is lost" in capsys.readouterr().err
    assert call([*flags, "--allow-rounding"]) == 0
    said = capsys.readouterr().out
    assert "14 layers moved, " in said
    assert "14 layers were rounded: relative error " in (tmp_path / "out" / "README.md").read_text()
    assert call(["verify", tmp_path / "out", "--against", packed]) == 0

    exported = export(packed, "mlx", tmp_path / "again", allow_rounding=True).rounding
    layer = load_packed(packed).model.layers[0].mlp.down_proj
    tensors = load_file(tmp_path / "again" / "model.safetensors")
    name = "model.layers.0.mlp.down_proj"
    codes, scale, zero_point = layer.unsigned()
    theirs = scale.double().unsqueeze(-1) * codes.unflatten(1, (-1, 32)) + tensors[f"{name}.biases"].double().unsqueeze(
        -1
    )
    ours = scale.double().unsqueeze(-1) * (codes.unflatten(1, (-1, 32)).double() - zero_point.double().unsqueeze(-1))
    steps = float(((theirs - ours) / scale.double().unsqueeze(-1)).abs().max())
    assert 0 < steps <= exported.steps < 0.05
    assert 0 < exported.error < 2**-8


def test_scales_are_rounded_where_it_is_allowed(tiny, tmp_path):
    model = tiny("llama")
    prepare(model, QuantScheme(4, 32))
    packed = save_packed(model, tmp_path / "packed")
    assert export(packed, "gptq", tmp_path / "out", allow_rounding=True).rounding.error < 2**-11
    assert "dense, 14 layers moved bit for bit" in str(export(packed, "dense", tmp_path / "dense", allow_rounding=True))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.scale[0, 0] = 1e-9
    with pytest.raises(
        LlmqatError, match=r"1 of its \d+ scales, 1e-09 among them, are beyond float16 numbers; train with"
    ):
        export(save_packed(model, tmp_path / "small"), "gptq", tmp_path / "none", allow_rounding=True)


def test_an_output_that_holds_anything_is_refused(finished, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(LlmqatError, match=r"output .* is not empty; choose another --output"):
        export(finished, "dense", tmp_path)
    with pytest.raises(LlmqatError, match=r"output .*finished is the directory of the model"):
        export(finished, "dense", finished)
    with pytest.raises(LlmqatError, match=r"mine\.txt is a file; choose a directory"):
        export(finished, "dense", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_unknown_format(finished, tmp_path):
    with pytest.raises(LlmqatError, match="unknown format 'nothing'; choose one of dense, gguf, gptq, awq, mlx, onnx"):
        export(finished, "nothing", tmp_path / "out")


def test_a_failure_leaves_nothing(finished, tmp_path, monkeypatch):
    def fail(source, scratch):
        (scratch / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(exporting.WRITERS, "dense", fail)
    with pytest.raises(LlmqatError, match=r"cannot write to .*: No space left on device; free some space, or choose"):
        export(finished, "dense", tmp_path / "below" / "out")
    assert list(tmp_path.iterdir()) == []
