"""Files appear whole or not at all; a full disk and a read-only directory are one-line errors that harm nothing."""

import contextlib
import fcntl
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmqat.cli import main
from llmqat.cli.entry import quiet_libraries
from llmqat.errors import LlmqatError
from llmqat.files import PARTIAL, appearing, discard_partial, locked, replacing
from llmqat.formats.verify import verify
from llmqat.pipeline import run as pipeline
from llmqat.train.checkpoint import Checkpoints


def listing(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@contextlib.contextmanager
def full_disk(limit=1000):
    """Files of this process cannot grow beyond `limit` bytes; writes fail for real, as they do on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextlib.contextmanager
def without_privileges():
    """Root may write anywhere: be somebody else for a while, who may not be able to import anything either."""
    quiet_libraries()
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def read_only():
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o555)
    yield folder
    folder.chmod(0o755)
    shutil.rmtree(folder)


def test_a_directory_appears_whole_and_the_one_of_a_sooner_process_stays(tmp_path):
    for text in ("first", "second"):
        with appearing(tmp_path / "below" / "model", "set PLACE") as scratch:
            (scratch / "a.json").write_text(text)
            assert (tmp_path / "below" / "model").exists() == (text == "second")
    message = "cannot write to .*below: File too large; free some space, or set PLACE"
    with (
        pytest.raises(LlmqatError, match=message),
        full_disk(),
        appearing(tmp_path / "below/b", "set PLACE") as scratch,
    ):
        (scratch / "a.json").write_text("x" * 2000)
    assert listing(tmp_path) == {"below/model/a.json": b"first"}


BIG = torch.zeros(1000)
WRITERS = {
    "safetensors": lambda scratch: save_file({"x": BIG}, scratch / "a.safetensors"),
    "torch": lambda scratch: Checkpoints(scratch).save({"x": BIG}),
    "text": lambda scratch: (scratch / "a.json").write_text("x" * 2000),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_is_one_line(writer, tmp_path):
    (tmp_path / "a.json").write_text("old")
    message = r"cannot write to .*: File too large; free some space, or choose another --output"

    def write():
        with full_disk(), replacing(tmp_path) as scratch:
            (scratch / "b.json").write_text("new")
            WRITERS[writer](scratch)

    with pytest.raises(LlmqatError, match=message):
        write()
    assert listing(tmp_path) == {"a.json": b"old"}


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="bug"), replacing(tmp_path):
        raise RuntimeError("bug")


def test_the_seal_goes_first_and_comes_last(tmp_path, monkeypatch):
    """Cut short between two renames, the directory lacks the file without which it is nothing."""
    for name in ("a-1.bin", "a-2.bin", "seal", "other"):
        (tmp_path / name).write_text("old")
    seen, original = [], os.replace

    def replace(source, target):
        seen.append((target.name, sorted(path.name for path in tmp_path.iterdir() if path.is_file())))
        original(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path, seal="seal", owned=("a-*.bin",)) as scratch:
        (scratch / "below").mkdir()
        for name in ("seal", "z", "a-1.bin", "below/b"):
            (scratch / name).write_text("new")
    assert [name for name, _ in seen] == ["a-1.bin", "b", "z", "seal"]
    assert seen[0][1] == ["a-1.bin", "other"]
    new = {name: b"new" for name in ("a-1.bin", "below/b", "seal", "z")}
    assert listing(tmp_path) == {**new, "other": b"old"}


def test_leavings_of_a_killed_process(tmp_path):
    for place in (tmp_path, tmp_path / "checkpoint", tmp_path / "checkpoint" / "gptq"):
        (place / f"{PARTIAL}x").mkdir(parents=True)
        (place / f"{PARTIAL}x" / "half").write_text("half")
        (place / "whole").write_text("whole")
    discard_partial(tmp_path, ("", "checkpoint", "checkpoint/gptq"))
    names = ("whole", "checkpoint/whole", "checkpoint/gptq/whole")
    assert listing(tmp_path) == dict.fromkeys(names, b"whole")


def test_an_output_that_cannot_be_read(read_only, capsys):
    read_only.chmod(0o333)
    with without_privileges():
        assert main(["finetune", "--output", str(read_only)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"llmqat: cannot read {read_only}: Permission denied; choose another --output"


def test_another_process_is_kept_out(tmp_path, capsys):
    with locked(tmp_path):
        assert main(["finetune", "--output", str(tmp_path)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert (
        error == f"llmqat: another process is writing to {tmp_path}; wait until it is done, or choose another --output"
    )
    with locked(tmp_path), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fcntl, "flock", lambda *args: (_ for _ in ()).throw(OSError(95, "Operation not supported")))
        with locked(tmp_path):
            pass


def command(recipe, directory, *flags):
    from llmqat.config import to_yaml

    directory.with_suffix(".yaml").write_text(to_yaml(recipe))
    return main(["finetune", "--recipe", str(directory.with_suffix(".yaml")), "--output", str(directory), *flags])


@pytest.mark.parametrize("stage", ["run_gptq", "fit", "write_contents", "write_reports"])
def test_a_run_out_of_disk(stage, small_recipe, finished, tmp_path, monkeypatch, capsys):
    directory = shutil.copytree(finished, tmp_path / "out")
    original = getattr(pipeline, stage)

    def limited(*args, **kwargs):
        with full_disk():
            return original(*args, **kwargs)

    recipe = small_recipe(directory, {"train.mode": "full", "quant.bits": 3})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, stage, limited)
        assert command(recipe, directory, "--overwrite") == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"llmqat: cannot write to {directory}")
    assert "free some space" in error
    assert not list(directory.rglob(f"{PARTIAL}*"))
    if stage != "write_reports":
        assert (directory / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
        assert verify(directory).ok
    assert main(["finetune", "--output", str(directory), "--resume"]) == 0
    assert verify(directory).ok
    assert (directory / "model.safetensors").read_bytes() != (finished / "model.safetensors").read_bytes()


@pytest.mark.parametrize("below", ["", "new"])
def test_a_read_only_output(below, read_only, capsys):
    with without_privileges():
        assert main(["finetune", "--output", str(read_only / below)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"llmqat: cannot write to {read_only / below}: Permission denied; choose another --output"
    assert not list(read_only.iterdir())


def test_an_output_that_cannot_be_looked_into(read_only, capsys):
    read_only.chmod(0)
    with without_privileges():
        assert main(["finetune", "--output", str(read_only / "new")]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    assert error == f"llmqat: cannot write to {read_only / 'new'}: Permission denied; choose another --output"
