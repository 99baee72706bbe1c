"""The files of engines, on stand-ins for the engines: what each is asked, and what becomes of its answer."""

import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from llmqat.pipeline import worker
from llmqat.pipeline.engines import llama_cpp, mlx, openvino, torch_model, transformers, vllm
from llmqat.pipeline.engines.table import ENGINES

FOLDER = Path(vllm.__file__).parent
LOGITS = np.random.default_rng(0).normal(size=(5, 7))
RIGHT = torch.from_numpy(LOGITS).log_softmax(-1)[:4].numpy()
JOB = {"format": "packed", "gguf": "model.gguf", "dtype": "float32", "context": 9}


def stand_in(monkeypatch, name, **names):
    module = ModuleType(name)
    vars(module).update(names)
    monkeypatch.setitem(sys.modules, name, module)


def test_every_engine_has_a_file_that_needs_nothing_of_llmqat():
    own = {"__init__", "table", "run_passages", "torch_model"}
    assert {path.stem for path in FOLDER.glob("*.py")} - own == {name.replace(".", "_") for name in ENGINES}
    for path in FOLDER.glob("*.py"):
        names = {
            alias.name if isinstance(node, ast.Import) else node.module
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert path.stem in ("table", "llmqat") or not any(str(name).startswith("llmqat") for name in names), path


class Llama:
    def __init__(self, path, **options):
        assert (path, options["n_ctx"], options["logits_all"]) == ("out/model.gguf", 9, True)
        self.scores = np.zeros((9, 7))

    def tokenize(self, text, special):
        return [*text]

    def reset(self):
        self.scores[:] = 0

    def eval(self, ids):
        self.scores[: len(ids)] = LOGITS[: len(ids)]

    def generate(self, ids, temp, repeat_penalty):
        assert (temp, repeat_penalty) == (0.0, 1.0)
        yield from range(100)


def test_llama_cpp(monkeypatch):
    stand_in(monkeypatch, "llama_cpp", Llama=Llama)
    model = llama_cpp.load("out", JOB)
    assert model.tokens("ab") == [97, 98]
    assert model.greedy([1, 2], 3) == [0, 1, 2]
    np.testing.assert_allclose(model.log_probabilities([1, 2, 3, 4, 5]), RIGHT, atol=1e-6)


class LLM:
    def __init__(self, directory, **options):
        assert (directory, options["dtype"], options["max_model_len"]) == ("out", "float32", 9)
        assert options["max_logprobs"] == -1

    def get_tokenizer(self):
        return SimpleNamespace(encode=lambda text: [*text.encode()])

    def generate(self, prompt, sampling, use_tqdm):
        ids = prompt["prompt_token_ids"]
        flat = SimpleNamespace(token_ids=[], logprobs=[], start_indices=[0], end_indices=[0])
        for row, following in zip(RIGHT, ids[1:], strict=True):
            order = [following, *np.argsort(-row).tolist()]  # the given one first, and again in its place
            flat.start_indices.append(len(flat.token_ids))
            flat.token_ids += order
            flat.logprobs += row[order].tolist()
            flat.end_indices.append(len(flat.token_ids))
        assert sampling.detokenize is False
        new = list(range(sampling.max_tokens))
        return [SimpleNamespace(prompt_logprobs=flat, outputs=[SimpleNamespace(token_ids=new)])]


def test_vllm(monkeypatch):
    monkeypatch.setattr(vllm.os, "environ", {})
    stand_in(monkeypatch, "vllm", LLM=LLM, SamplingParams=lambda **options: SimpleNamespace(**options))
    model = vllm.load("out", JOB)
    assert vllm.os.environ["VLLM_CPU_INT4_W4A8"] == "0"
    assert model.tokens("ab") == [97, 98]
    assert model.greedy([1, 2, 3, 4, 5], 3) == [0, 1, 2]
    np.testing.assert_allclose(model.log_probabilities([1, 2, 3, 4, 5]), RIGHT, atol=1e-6)


class Port(str):
    """An input or output of a graph, by its name."""

    def get_any_name(self):
        return str(self)


class Graph:
    """A compiled model whose logits are those of `LOGITS` behind the text so far, and which keeps it as its cache."""

    inputs = Port("input_ids"), Port("past_key_values.0.key")
    outputs = Port("logits"), Port("present.0.key")

    def __call__(self, given):
        past, ids = given["past_key_values.0.key"], given["input_ids"]
        kept = np.concatenate([past, np.zeros((1, 2, ids.shape[1], 3), np.float32)], 2)
        return dict(zip(self.outputs, (LOGITS[None, past.shape[2] : kept.shape[2]], kept), strict=True))


def test_openvino(monkeypatch, tmp_path):
    decoder = {"num_key_value_heads": 2, "head_size": 3}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"decoder": decoder}}))

    def compile_model(path, device, options):
        assert (path, device, options["INFERENCE_PRECISION_HINT"]) == (tmp_path / "model.onnx", "CPU", "f32")
        return Graph()

    tokenizer = SimpleNamespace(from_pretrained=lambda directory: lambda text: {"input_ids": [*text.encode()]})
    stand_in(monkeypatch, "openvino", compile_model=compile_model)
    stand_in(monkeypatch, "transformers", AutoTokenizer=tokenizer)
    model = openvino.load(str(tmp_path), JOB)
    assert model.tokens("ab") == [97, 98]
    assert model.greedy([1, 2], 3) == LOGITS[1:4].argmax(-1).tolist()
    np.testing.assert_allclose(model.log_probabilities([1, 2, 3, 4, 5]), RIGHT, atol=1e-6)


class MlxModel:
    def set_dtype(self, dtype):
        assert dtype == "float32 of mlx"

    def __call__(self, ids):
        return LOGITS[None, : ids.shape[1]]


def test_mlx(monkeypatch):
    tokenizer = SimpleNamespace(encode=lambda text: [*text.encode()])
    stand_in(monkeypatch, "mlx", core=None)
    stand_in(monkeypatch, "mlx.core", array=np.array, float32="float32 of mlx")
    sys.modules["mlx"].core = sys.modules["mlx.core"]
    stand_in(monkeypatch, "mlx_lm", load=lambda directory: (MlxModel(), tokenizer))
    steps = lambda ids, model, max_tokens: ((token, None) for token in range(max_tokens))  # noqa: E731
    stand_in(monkeypatch, "mlx_lm.generate", generate_step=steps)
    model = mlx.load("out", JOB)
    assert model.tokens("ab") == [97, 98]
    assert model.greedy([1, 2], 3) == [0, 1, 2]
    np.testing.assert_allclose(model.log_probabilities([1, 2, 3, 4, 5]), RIGHT, atol=1e-6)


def test_gptqmodel(monkeypatch):
    def load(directory, device, dtype):
        assert (directory, device, dtype) == ("out", "cpu", torch.float32)
        return SimpleNamespace(model="model", tokenizer="tokenizer")

    stand_in(monkeypatch, "gptqmodel", GPTQModel=SimpleNamespace(load=load))
    found = worker.module_at(FOLDER / "gptqmodel.py").load("out", JOB)
    assert (found.model, found.tokenizer) == ("model", "tokenizer")


def test_greedy_of_a_torch_model_does_not_end_early(tiny_llama):
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(128))
    found = torch_model.TorchModel(model, None).greedy([1, 2, 3], 5)
    ids = [1, 2, 3]
    for token in found:
        assert token == int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
    assert len(found) == 5


@pytest.mark.parametrize(("symmetric", "targets"), [(False, ["Linear"]), (True, ["Linear", "model.embed_tokens"])])
def test_what_transformers_runs_dequantized_only(tmp_path, symmetric, targets):
    def needs(symmetric, targets, **asked):
        groups = {"g": {"weights": {"symmetric": symmetric}, "targets": targets}}
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"config_groups": groups, **asked}}))
        return transformers.needs_dequantize(str(tmp_path))

    assert needs(symmetric, targets)
    assert not needs(symmetric, targets, dequantize=True), "config.json asks for it"
    assert not needs(True, ["Linear"])
    assert not needs(True, ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"])
