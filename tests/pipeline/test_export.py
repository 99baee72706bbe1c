"""An export appears whole or not at all, and never in the place of anything."""

import pytest

from llmqat.errors import LlmqatError
from llmqat.formats.export.holds import HOLDS
from llmqat.pipeline import export as exporting
from llmqat.pipeline.export import WRITERS, export


def test_every_format_of_the_table_is_written():
    assert WRITERS.keys() == HOLDS.keys()


def test_command_line(finished, tmp_path, call, capsys):
    assert call(["export", finished, "--to", "dense", "--output", tmp_path / "out"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: dense, 14 layers moved bit for bit, ")
    assert call(["export", finished, "--to", "nothing", "--output", tmp_path / "out2"]) == 2
    assert "invalid choice: 'nothing'" in capsys.readouterr().err


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
    with pytest.raises(LlmqatError, match="unknown format 'nothing'; choose one of dense, gguf, gptq, awq, mlx"):
        export(finished, "nothing", tmp_path / "out")


def test_a_failure_leaves_nothing(finished, tmp_path, monkeypatch):
    def fail(source, scratch):
        (scratch / "half").write_text("")
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(exporting.WRITERS, "dense", fail)
    with pytest.raises(LlmqatError, match=r"cannot write to .*: No space left on device; free some space, or choose"):
        export(finished, "dense", tmp_path / "below" / "out")
    assert list(tmp_path.iterdir()) == []
