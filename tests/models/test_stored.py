"""What weight files say, whatever the config beside them says."""

import json
import re
import shutil

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from llmqat.errors import LlmqatError
from llmqat.models.stored import (
    Header,
    float_weight_files,
    headers,
    separate_heads,
    stored_dtype,
    stores_only,
    tensor_of,
)


def write(path, **tensors):
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_headers(tmp_path):
    path = write(
        tmp_path / "x.safetensors", a=torch.zeros(2, 3, dtype=torch.bfloat16), b=torch.zeros((), dtype=torch.int8)
    )
    assert headers(path) == {"a": Header("BF16", (2, 3)), "b": Header("I8", ())}
    assert [header.elements for header in headers(path).values()] == [6, 1]
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(SafetensorError):
        headers(path)


@pytest.mark.parametrize("index", [None, "{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": ["x"]}}'])
def test_no_files_that_transformers_would_read(tmp_path, index):
    if index is not None:
        (tmp_path / "model.safetensors.index.json").write_text(index)
    assert float_weight_files(tmp_path) == []
    assert stored_dtype(tmp_path, torch.float16) == torch.float16
    assert stored_dtype(tmp_path, None) == torch.float32


def test_one_dtype_alone(tmp_path):
    write(tmp_path / "model.safetensors", a=torch.zeros(2).half(), b=torch.zeros(2, dtype=torch.int64))
    assert stores_only(tmp_path, torch.float16)
    assert not stores_only(tmp_path, torch.bfloat16)
    write(tmp_path / "model.safetensors", a=torch.zeros(2).half(), b=torch.zeros(1))
    assert not stores_only(tmp_path, torch.float16)


def test_files_of_an_index(tmp_path):
    one, two = (write(tmp_path / f"{name}.safetensors", **{name: torch.zeros(2)}) for name in "ab")
    index = {"weight_map": {"a": one.name, "b": two.name, "c": "lost.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert float_weight_files(tmp_path) == [one, two]
    assert torch.equal(tensor_of(tmp_path, "b"), torch.zeros(2))
    assert tensor_of(tmp_path, "c") is None


def test_most_numbers_decide(tmp_path):
    write(
        tmp_path / "model.safetensors", a=torch.zeros(9, dtype=torch.float16), b=torch.zeros(8), c=torch.zeros(99).int()
    )
    assert stored_dtype(tmp_path, torch.float32) == torch.float16


def test_numbers_too_narrow(tmp_path):
    write(tmp_path / "model.safetensors", a=torch.zeros(9, dtype=torch.float8_e4m3fn))
    with pytest.raises(LlmqatError, match=r"stored as F8_E4M3, and config\.json has no quantization_config that says"):
        stored_dtype(tmp_path, None)


def test_damaged(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x" * 40)
    message = f"cannot load the weights of {re.escape(str(tmp_path))}.*; copy or download the model again"
    with pytest.raises(LlmqatError, match=message):
        stored_dtype(tmp_path, None)


def test_heads_of_their_own(tmp_path):
    ties = {"head": "embedding"}
    file = tmp_path / "model.safetensors"
    for tensors, separate in (
        ({"embedding": torch.ones(2)}, []),
        ({"embedding": torch.ones(2), "head": torch.ones(2)}, []),
        ({"embedding": torch.ones(2), "head": torch.zeros(2)}, ["head"]),
    ):
        write(file, **tensors)
        assert list(separate_heads(tmp_path, ties)) == separate
    shutil.rmtree(tmp_path)
    assert list(separate_heads(tmp_path, ties)) == []
