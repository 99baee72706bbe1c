"""An engine says what the packed model says, within what its arithmetic costs; or one line says what is not so."""

import json
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.pipeline import other_python, run_engine, verify_runtime, worker
from llmqat.pipeline.engines.torch_model import TorchModel
from llmqat.pipeline.export import export
from llmqat.pipeline.passages import COUNT, Passages
from llmqat.pipeline.run_engine import Ran
from llmqat.pipeline.verify_export import verify_export
from llmqat.pipeline.verify_runtime import Distance, other_arithmetic
from llmqat.scheme import QuantScheme


@pytest.fixture(scope="module")
def packed(tiny, merging_tokenizer, tmp_path_factory):
    model = tiny("llama", vocab_size=264)
    prepare(model, QuantScheme(4, 32), storage_dtype=torch.bfloat16)
    return save_packed(model, tmp_path_factory.mktemp("packed") / "packed", merging_tokenizer)


@pytest.fixture(scope="module")
def dense(packed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense")
    export(packed, "dense", folder / "out")
    return folder / "out"


@pytest.fixture
def in_this_process(monkeypatch):
    """Engines that need no environment of their own, without the seconds in which torch is imported again."""

    def start(python, folder, failed):
        monkeypatch.setattr(sys, "argv", ["worker.py", str(folder)])
        worker.main()

    monkeypatch.setattr(other_python, "_start", start)


@pytest.mark.usefixtures("in_this_process")
def test_an_export_and_the_packed_directory_itself(packed, dense, tmp_path, call, capsys):
    runtime = ["--runtime", "transformers", "--json", tmp_path / "said.json"]
    assert call(["verify", dense, "--against", packed, *runtime]) == 0
    shown = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (shown["all equal"], shown["same greedy"]) == ("True", "5 of 5")
    said = json.loads((tmp_path / "said.json").read_text())["runtime"]
    assert (said["format"], said["dtype"], said["same_ids"], said["ok"]) == ("dense", "float32", COUNT, True)
    assert 0 < said["kl"] <= said["kl_bound"] < 1e-9
    assert said["versions"].keys() == {"transformers"}
    assert call(["verify", packed, "--runtime", "llmqat", "--text", __file__]) == 0
    assert "top-1            100.0%" in capsys.readouterr().out


@pytest.mark.usefixtures("in_this_process")
def test_an_engine_that_computes_something_else(packed, dense, tmp_path, call, capsys):
    other = shutil.copytree(dense, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] *= 1.01
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    assert call(["verify", other, "--against", packed, "--runtime", "transformers"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"holds other numbers in model\.norm\.weight; transformers has a KL of .* from it, and .* is", error
    )


@pytest.fixture(scope="module")
def ran(packed, merging_tokenizer):
    """An engine that says what llmqat says."""
    ours, passages = load_packed(packed, torch.float32), Passages.of(None, merging_tokenizer, 64)
    return Ran(
        {},
        [merging_tokenizer(text)["input_ids"] for text in passages.texts],
        [TorchModel(ours).greedy(ids[: passages.prompt], passages.new) for ids in passages.ids],
        1.0,
        [verify_runtime.log_probabilities(ours, ids) for ids in passages.ids],
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"greedy": [[5] * 48] * COUNT},
            "mlx continues by a token .* nats below the likeliest, and .* is allowed; expo",
        ),
        ({"ids": [[1, 2]] * COUNT}, "mlx cuts 5 passages into other tokens; export that again"),
        (
            {"log_probabilities": [torch.zeros(62, 9)] * COUNT},
            "the engine knows 9 words, and the packed model 264; exp",
        ),
    ],
)
def test_each_thing_that_an_engine_says_is_compared(packed, ran, change, message, monkeypatch, call, capsys):
    monkeypatch.setattr(
        verify_runtime, "other_arithmetic", lambda *_: [[rows + 1e-3 for rows in ran.log_probabilities]]
    )
    for changes, status in (({}, 0), (change, 1)):
        monkeypatch.setattr(verify_runtime, "run_engine", lambda *_, changes=changes: ran._replace(**changes))
        assert call(["verify", packed, "--runtime", "mlx"]) == status
    assert re.search(message, capsys.readouterr().err)


def test_the_bound_is_what_the_arithmetic_costs(packed, merging_tokenizer):
    passages = Passages.of(None, merging_tokenizer, 64)
    ours = load_packed(packed, torch.float32)
    right = [verify_runtime.log_probabilities(ours, ids) for ids in passages.ids]

    def lost(dtype, rounds, int8):
        return [Distance.of(right, other).kl for other in other_arithmetic(packed, passages, dtype, rounds, int8)]

    (rounded,), (unrounded,) = lost(torch.float32, True, False), lost(torch.float32, False, False)
    assert rounded < 1e-9 < unrounded < 1e-3
    assert lost(torch.float32, False, True)[0] == unrounded
    assert lost(torch.float32, False, True)[1] > unrounded


def test_text_that_is_too_short(merging_tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("x" * 50)
    with pytest.raises(
        LlmqatError, match=r"a 5th of .*short\.txt gives 10 tokens, and 17 are needed; give a longer --"
    ):
        Passages.of(str(tmp_path / "short.txt"), merging_tokenizer, None)


FAILS = """
class Llama:
    def __init__(self, *_, **__):
        raise ValueError("no tensor\\n[rank0]:   of two lines")
"""
ENDS = "import os\nos.kill(os.getpid(), 11)"


def test_engines_that_do_not_run(packed, dense, tmp_path, monkeypatch):
    passages = Passages(["a"], [[1, 2]], 1, 1, 3)

    def run(runtime, directory, held_as, python=sys.executable):
        return run_engine.run_engine(runtime, directory, held_as, passages, python)

    with pytest.raises(LlmqatError, match=r"mlx runs mlx, and .*out is dense; choose transformers, vllm, llmqat"):
        run("mlx", dense, "dense")
    with pytest.raises(
        LlmqatError, match=r"mlx needs packages that .* does not have: pip install mlx-lm, or name the P"
    ):
        run("mlx", dense, "mlx")
    with pytest.raises(
        LlmqatError, match=r"cannot start none/python: No such file or directory; give the Python of an"
    ):
        run("mlx", dense, "mlx", "none/python")
    for text, message in (
        (FAILS, "ValueError: no tensor of two lines"),
        (ENDS, "signal 11 ended it; its last line: nothing was"),
    ):
        (tmp_path / "llama_cpp.py").write_text(text)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with pytest.raises(LlmqatError, match=f"llama.cpp cannot run .*out: {message}"):
            run("llama.cpp", dense, "gguf")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--text", "--text says nothing without --runtime; add that, or leave it out"),
        ("--runtime-python", "--runtime-python says nothing without --runtime; add that"),
        ("--json", "--json writes what --against or --runtime find; add one of them"),
    ],
)
def test_flags_that_say_nothing(packed, flag, message, call, capsys):
    assert call(["verify", packed, flag, "x"]) == 1
    assert message in capsys.readouterr().err


def test_a_packed_directory_is_no_export(packed):
    with pytest.raises(LlmqatError, match="is a packed directory, and no export of one; leave --against out"):
        verify_export(packed, packed)
