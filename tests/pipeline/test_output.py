"""Whose an output directory is: a run that is refused touches nothing, and nothing foreign is ever deleted."""

import os
import shutil

import pytest

from llmqat.config import Recipe, to_yaml
from llmqat.errors import LlmqatError
from llmqat.pipeline.output import check_apart, check_output, claimed, forget_earlier, saved_recipe
from llmqat.pipeline.saved import Record


def listing(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("file", ["model.safetensors", "recipe.yaml", "checkpoint/checkpoint.pt", "checkpoint/mine"])
def test_only_a_run_is_resumed(tmp_path, file):
    """A recipe alone is what every finished run publishes."""
    check_output(tmp_path / "new", True, False)
    (tmp_path / "checkpoint" / ".partial-x").mkdir(parents=True)
    (tmp_path / "checkpoint" / ".partial-x" / "half").write_text("of a run that was killed before its first file")
    check_output(tmp_path, True, False)
    check_output(tmp_path, False, False)
    (tmp_path / file).write_text(to_yaml(Recipe()))
    message = "holds other files, and nothing in checkpoint/ to go on from; choose another --output, or start again"
    with pytest.raises(LlmqatError, match=message):
        check_output(tmp_path, True, False)
    check_output(tmp_path, True, True)
    Record(Recipe(), {}).write(tmp_path / "checkpoint")
    check_output(tmp_path, True, False)
    with pytest.raises(LlmqatError, match="is not empty; choose another --output, go on with --resume, or add"):
        check_output(tmp_path, False, False)


def test_a_run_goes_on_with_its_recipe_wherever_it_lies(tmp_path):
    assert saved_recipe(tmp_path / "out") is None
    overrides = {"o_proj$": {"bits": 8}, "down_proj$": "float"}
    asked = Recipe().with_values({"model": "/my/model", "train.batch_size": 3, "quant.overrides": overrides})
    Record(asked, {}).write(tmp_path / "out" / "checkpoint")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert saved_recipe(tmp_path / "moved") == asked.with_values({"output": str(tmp_path / "moved")})


@pytest.mark.parametrize(
    ("output", "relation"),
    [("models/m", "is"), ("models/m/out", "lies inside"), ("models", "holds"), (".", "holds"), ("link", "is")],
)
def test_the_model_stays_apart(tmp_path, monkeypatch, output, relation):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "m").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "models" / "m")
    check_apart(tmp_path / "out", "models/m")
    check_apart(tmp_path / "models" / "m2", "models/m")
    check_apart(tmp_path / "models", "org/name-on-the-hub")
    with pytest.raises(
        LlmqatError, match=rf"output \S+ {relation} the directory of the model models/m; choose another"
    ):
        check_apart(tmp_path / output, "models/m")


@pytest.mark.parametrize("flags", [(False, False), (True, False), (True, True), (False, True)])
def test_a_refused_run_touches_nothing(tmp_path, call, model_dir, text_file, quantize_flags, flags, capsys):
    """Neither with --resume nor with --overwrite, where the output is the model; nor a neighbour's unfinished files."""
    resume, overwrite = flags
    model = shutil.copytree(model_dir, tmp_path / "own")
    unfinished = model / "run" / "checkpoint" / ".partial-abc"
    unfinished.mkdir(parents=True)
    (unfinished / "checkpoint.pt").write_text("being written")
    (model / "checkpoint").mkdir()
    (model / "checkpoint" / "mine.bin").write_text("precious")
    before = listing(tmp_path)
    argv = ["quantize", "--model", model, "--dataset", text_file, "--output", model, *quantize_flags]
    assert call([*argv, *["--resume"] * resume, *["--overwrite"] * overwrite]) == 1
    assert "is the directory of the model" in capsys.readouterr().err
    other = ["quantize", "--model", model_dir, "--dataset", text_file, "--output", model, *quantize_flags]
    if not overwrite:
        assert call([*other, *["--resume"] * resume]) == 1
    assert listing(tmp_path) == before


def test_a_directory_made_for_nothing_goes(tmp_path):
    def fail():
        with claimed(tmp_path / "a" / "b", "llama", False, False):
            assert (tmp_path / "a" / "b").is_dir()
            raise LlmqatError("no such dataset")

    with pytest.raises(LlmqatError, match="no such dataset"):
        fail()
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "a", "llama", False, False):
        (tmp_path / "a" / "file").write_text("")
    assert (tmp_path / "a" / "file").exists()


def test_unfinished_files_go_where_a_run_writes(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    places = [tmp_path / "out" / name for name in ("", "checkpoint", "checkpoint/gptq")]
    for place in [*places, elsewhere, tmp_path / "out" / "other" / "checkpoint"]:
        (place / ".partial-x").mkdir(parents=True)
        (place / ".partial-x" / "half").write_text("half")
    os.symlink(elsewhere, tmp_path / "out" / "adapter")
    with claimed(tmp_path / "out", "llama", False, True):
        pass
    assert set(listing(tmp_path)) == {"elsewhere/.partial-x/half", "out/other/checkpoint/.partial-x/half"}


def test_what_is_not_ours_is_not_forgotten(tmp_path):
    ours = ["checkpoint/checkpoint.pt", "checkpoint/measured.json", "checkpoint/gptq/block-00001.pt"]
    ours += ["adapter/adapter_config.json", "checkpoint/llmqat/events.out.tfevents.1"]
    theirs = ["checkpoint/mine.bin", "adapter/notes.txt", "checkpoint/gptq/notes"]
    for name in [*ours, *theirs]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    forget_earlier(tmp_path)
    assert set(listing(tmp_path)) == set(theirs)
