import ctypes
import sys
import zipfile
from math import prod

import numpy as np
import pytest
import torch

from eval._peers import bandwidth, environments, llama_cpp_peer, torch_peers
from eval._peers.shapes import GROUP_SIZE, MODELS
from eval._peers.timing import mean_rate

PARAMETERS = {"llama-1b": 1_235_814_400, "llama-110m": 109_529_856}  # the first is Llama-3.2-1B's


@pytest.mark.parametrize("shape", list(PARAMETERS))
def test_gguf_has_the_parameters_of_the_model(shape):
    assert sum(prod(size) for size in llama_cpp_peer.tensors_of(MODELS[shape]).values()) == PARAMETERS[shape]


def test_the_dense_model_is_of_the_same_shape_as_the_gguf():
    shape = MODELS["tiny"]
    model = torch_peers.dense_model(shape, torch.float32)
    expected = sum(prod(size) for size in llama_cpp_peer.tensors_of(shape).values())
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.rope_parameters["rope_theta"] == shape.rope_theta
    assert torch.isfinite(model(torch.arange(8)[None]).logits).all()


def test_int4pack_computes_its_matmul():
    torch.manual_seed(0)
    layer = torch_peers.Int4Pack(64, 2 * GROUP_SIZE, torch.bfloat16)
    weight = layer(torch.eye(2 * GROUP_SIZE, dtype=torch.bfloat16)).T.float()
    codes = (weight / 0.01).round()
    assert codes.min() == -8
    assert codes.max() == 7
    x = torch.randn(3, 2 * GROUP_SIZE, dtype=torch.bfloat16)
    expected = x.double() @ weight.double().T
    dense = (x @ weight.bfloat16().T).double()
    error, baseline = ((y - expected).norm() for y in (layer(x).double(), dense))
    assert error <= 2 * baseline


def test_stored_bytes_of_a_layer_are_codes_and_scales():
    layer = torch_peers.Int4Pack(64, 2 * GROUP_SIZE, torch.bfloat16)
    assert torch_peers.stored_bytes(layer) == 64 * 2 * GROUP_SIZE // 2 + 64 * 2 * 2 * 2
    assert torch_peers.stored_bytes(torch_peers.dense(8, 16, torch.bfloat16)) == 8 * 16 * 2


@pytest.mark.parametrize("compiler", [True, False])
def test_reading_gives_a_rate(compiler, tmp_path, monkeypatch):
    if not compiler:
        monkeypatch.setattr(bandwidth.shutil, "which", lambda name: None)
    worker = bandwidth.Worker(1, tmp_path)
    assert ("read.c" in worker.describe()["method"]) == compiler
    assert worker.open(5 << 20) == {"bytes": 4 << 20}
    assert worker.gb_s(0.01) > 0.1


def test_a_sample_is_repeated_until_it_is_long_enough():
    seconds = iter([0.1, 0.3, 0.2])
    assert mean_rate(12, lambda: next(seconds), 0.5) == pytest.approx(36 / 0.6)


def test_the_tile_configuration_gets_a_barrier(tmp_path):
    source = tmp_path / "mmq.cpp"
    source.write_text(f"tc.rows[7] = 16;\n{environments.AMX_LOAD}done = true;\n")
    environments.mend_amx(source)
    lines = source.read_text().splitlines()
    assert lines[1:3] == [environments.AMX_BARRIER.rstrip("\n"), environments.AMX_LOAD.rstrip("\n")]


def test_another_release_without_that_load_is_refused(tmp_path):
    (tmp_path / "mmq.cpp").write_text("nothing\n")
    with pytest.raises(SystemExit, match=r"mmq\.cpp of llama-cpp-python.* loads its tile configuration elsewhere"):
        environments.mend_amx(tmp_path / "mmq.cpp")


def test_an_environment_is_installed_once_for_each_recipe(tmp_path):
    calls = []

    def install(directory):
        directory.mkdir(exist_ok=True)
        calls.append(directory)

    for recipe in ("a", "a", "b"):
        assert environments.made(tmp_path / "peer", recipe, install) == tmp_path / "peer" / "bin" / "python"
    assert len(calls) == 2


def test_a_wheel_is_installed_without_what_it_does_not_need(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w") as file:
        wanted = ("numpy", "torch==2.13.0+cpu", "torch-c-dlpack>1", "torchaudio; x", 'zen; extra == "zen"')
        file.writestr("a.dist-info/METADATA", "Name: a\n" + "".join(f"Requires-Dist: {one}\n" for one in wanted))
    found = environments.requirements_of(tmp_path / "a.whl", environments.NOT_FOR_VLLM)
    assert found == ["numpy", "torch-c-dlpack>1"]


def test_a_read_buffer_that_does_not_fit_is_an_error():
    with pytest.raises(MemoryError, match=r"no \d+ bytes for the read buffer"):
        bandwidth.readers_in_c("cc", 1 << 62, 1)


def test_a_read_loop_that_leaves_words_out_is_refused(tmp_path, monkeypatch):
    source = tmp_path / "read.c"
    source.write_text(bandwidth.SOURCE.read_text().replace("c < bytes / CHUNK", "c < bytes / CHUNK - 1"))
    monkeypatch.setattr(bandwidth, "SOURCE", source)
    with pytest.raises(RuntimeError, match=r"read\.c did not read every word"):
        bandwidth.readers_in_c("cc", 4 << 20, 1)


def test_a_model_that_stops_early_is_refused(tmp_path):
    worker = torch_peers.Worker(1, tmp_path, dtype="float32")
    worker.open_model("tiny")
    assert worker.decode_tok_s(4, 2, 0.001) > 0
    worker.model.generate = lambda input_ids, **options: input_ids
    with pytest.raises(RuntimeError, match="generate gave 0 tokens instead of 3"):
        worker.generate(4, 3)


class FakeLlama:
    """The calls of llama_cpp that the worker makes; loads nothing and decodes nothing."""

    llama_token = int
    llama_log_callback = staticmethod(lambda function: function)

    def __getattr__(self, name):
        return lambda *args: 0


def test_what_llama_cpp_cannot_do_is_an_error(tmp_path, monkeypatch):
    fake = FakeLlama()
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    worker = llama_cpp_peer.Worker(1, tmp_path, "Q4_0")
    with pytest.raises(RuntimeError, match=r"llama\.cpp cannot load tiny-Q4_0\.gguf"):
        worker.open_model("tiny")
    fake.llama_token = ctypes.c_int32
    fake.llama_decode = lambda context, batch: 1
    with pytest.raises(RuntimeError, match="llama_decode failed on 2 tokens"):
        worker.run(np.array([1, 2]))
