"""Graphs for ONNX Runtime hold the trained weights; a builder that would change them is found out."""

import importlib.util
import json
import re
import shutil
import subprocess

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from llmqat.errors import LlmqatError
from llmqat.formats.export import onnx as exporting
from llmqat.formats.export.onnx_graph import GRAPH, place_of
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline.export import export
from llmqat.pipeline.verify_export import verify_export
from llmqat.pipeline.verify_runtime import verify_runtime
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme

CASES = {"4bit": QuantScheme(4, 32), "2bit-asym": QuantScheme(2, 32, symmetric=False), "8bit": QuantScheme(8, 16)}


@pytest.fixture(scope="module")
def exported(tiny, merging_tokenizer, tmp_path_factory):
    """``exported(case)``: a packed directory and what it was exported to, made once."""
    made = {}

    def find(case):
        if case not in made:
            folder, model = tmp_path_factory.mktemp("onnx"), tiny("llama", vocab_size=264)
            prepare(model, CASES[case], storage_dtype=torch.float32 if case == "4bit" else torch.bfloat16)
            packed = save_packed(model, folder / "packed", merging_tokenizer)
            made[case] = packed, export(packed, "onnx", folder / "out").output
        return made[case]

    return find


def weight_of(node, tensors, directory):
    """``(N, K)`` in float32, as the description of MatMulNBits has it: integers from the lowest bits of a byte on."""
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    packed, scale, zero = (
        numpy_helper.to_array(tensors[name], base_dir=str(directory)).reshape(numbers["N"], -1)
        for name in list(node.input)[1:4]
    )

    def integers(rows):
        stream = np.unpackbits(rows, axis=1, bitorder="little").reshape(len(rows), -1, numbers["bits"])
        return stream @ (1 << np.arange(numbers["bits"]))

    groups = scale.shape[1]
    codes = integers(packed).reshape(numbers["N"], groups, numbers["block_size"])
    found = (codes - integers(zero)[:, :groups, None]).astype(np.float32) * scale[..., None]
    return found.reshape(numbers["N"], -1)


@pytest.mark.parametrize("case", CASES)
def test_weights_bit_for_bit(exported, case):
    packed, directory = exported(case)
    graph = onnx.load(directory / GRAPH, load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    found = {}
    for node in graph.node:
        assert node.op_type != "GatherBlockQuantized"
        if node.op_type == "MatMulNBits":
            found[place_of(node.name)] = [*found.get(place_of(node.name), ()), weight_of(node, tensors, directory)]
            assert {attribute.name: attribute.i for attribute in node.attribute}["accuracy_level"] == 1
    right = {}
    for name, layer in load_packed(packed).named_modules():
        if isinstance(layer, PackedLinear):
            codes, scale, zero_point = layer.unpack()
            exact = dequantize(codes, scale.float(), zero_point, layer.scheme).numpy()
            right[place_of(name)] = [*right.get(place_of(name), ()), exact]
    assert found.keys() == right.keys()
    assert all(np.array_equal(np.concatenate(found[place]), np.concatenate(right[place])) for place in right)


def test_the_engine_says_what_the_packed_model_says(exported):
    packed, directory = exported("4bit")
    found = verify_runtime(directory, packed, "onnxruntime")
    assert found.problems() == []
    assert found.same_greedy == found.same_ids == found.passages
    assert found.tokens_s > 0


def test_a_changed_scale_is_found(exported, tmp_path):
    packed, directory = exported("4bit")
    other = shutil.copytree(directory, tmp_path / "other")
    graph = onnx.load(other / GRAPH)
    scale = next(tensor for tensor in graph.graph.initializer if "o_proj" in tensor.name and "scales" in tensor.name)
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    onnx.save(graph, other / GRAPH)
    found = verify_export(other, packed)
    (line,) = found.differences
    assert re.fullmatch(r"holds other scales in block \d, o, 128 of 128: .* at \[0, 0\] where .* was packed", line)
    (other / GRAPH).write_bytes(b"no graph")
    with pytest.raises(LlmqatError, match=r"model\.onnx is damaged"):
        verify_export(other, packed)


def test_special_tokens_are_said_as_the_engine_reads_them(exported):
    said = json.loads((exported("4bit")[1] / "tokenizer_config.json").read_text())
    assert (said["add_bos_token"], said["add_eos_token"]) == (False, False)


def test_a_builder_that_changes_codes(packed_dir, exported, tmp_path, monkeypatch):
    """The graph of another model, with the same layers."""

    def build(source, checkpoint, output):
        shutil.copytree(exported("4bit")[1], output, dirs_exist_ok=True)

    monkeypatch.setattr(exporting, "_build", build)
    with pytest.raises(LlmqatError, match="wrote another model: it holds other codes in block 0, qkv, "):
        export(packed_dir(QuantScheme(4, 32, symmetric=False)), "onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_builder_that_fails(packed_dir, tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "noise\nNotImplementedError: no such rotary embedding\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(LlmqatError, match="builder of onnxruntime-genai failed: NotImplementedError: no such rotary"):
        export(packed_dir(QuantScheme(4, 32)), "onnx", tmp_path / "out")


def test_a_builder_that_is_not_there(packed_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LlmqatError, match=r"needs onnxruntime_genai, onnx, onnx_ir: pip install 'llmqat\[onnx\]'"):
        export(packed_dir(QuantScheme(4, 32)), "onnx", tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "scheme", "message"),
    [
        ("gemma2", QuantScheme(4, 32), "export to onnx is for ernie4_5, .*, and this is gemma2; choose another format"),
        ("llama", QuantScheme(3, 32), "it is W3A16 g32 symmetric; train with --bits 2 --group-size 32"),
    ],
)
def test_what_it_does_not_hold(packed_dir, tiny, tmp_path, family, scheme, message):
    with pytest.raises(LlmqatError, match=message):
        export(packed_dir(scheme, model=tiny(family)), "onnx", tmp_path / "out")
