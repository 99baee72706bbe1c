"""Files of weights that somebody prepared: names that leave the directory, indices that lie, tensors of other kinds."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmqat.errors import LlmqatError
from llmqat.formats import writer
from llmqat.formats.reader import load_packed
from llmqat.formats.weights import INDEX, WEIGHTS
from llmqat.formats.writer import save_packed

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def sharded(packed, monkeypatch, tmp_path):
    """A packed model in several files."""
    monkeypatch.setattr(writer, "MAX_SHARD_SIZE", 4000)
    return save_packed(packed[0], tmp_path / "sharded")


def edit_index(directory, edit):
    index = json.loads((directory / INDEX).read_text())
    edit(index["weight_map"])
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["/etc/x.safetensors", "../x.safetensors", "a/../../x.safetensors", "config.json", ""])
def test_an_index_names_files_of_its_directory(sharded, name):
    edit_index(sharded, lambda weight_map: weight_map.update({"model.norm.weight": name}))
    with pytest.raises(LlmqatError, match=r"names '.*', which is no safetensors file of its directory"):
        load_packed(sharded)


def test_a_link_that_leaves_the_directory(packed, tmp_path):
    path = packed[1] / WEIGHTS
    shutil.move(path, tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    with pytest.raises(LlmqatError, match=r"is a link that leaves its directory, to .*; put a copy of the file"):
        load_packed(packed[1])


def test_links_of_the_hubs_cache(packed, tmp_path):
    """A snapshot is made of links to blobs of the same repository."""
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "main", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    shutil.copytree(packed[1], blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert load_packed(snapshot) is not None


def test_two_models_in_one_directory(packed, sharded):
    shutil.copy(packed[1] / WEIGHTS, sharded)
    with pytest.raises(LlmqatError, match=r"the weights of two models; remove the one that is not meant"):
        load_packed(sharded)


def test_an_index_that_lies(sharded):
    shards = sorted(path.name for path in sharded.glob("model-*"))
    edit_index(
        sharded, lambda weight_map: weight_map.update({"model.norm.weight": shards[0], "lm_head.weight": shards[1]})
    )
    with pytest.raises(LlmqatError, match=r"says that .* is in model-.*, but it is in model-"):
        load_packed(sharded)


def test_an_index_with_a_tensor_that_is_nowhere(sharded):
    shard = next(sharded.glob("model-*")).name
    edit_index(sharded, lambda weight_map: weight_map.update({"ghost": shard}))
    with pytest.raises(LlmqatError, match=f"says that ghost is in {shard}, but it is in none"):
        load_packed(sharded)


def test_a_tensor_in_two_files(sharded):
    first, second, *_ = sorted(sharded.glob("model-*"))
    tensors = load_file(second) | {"model.norm.weight": torch.zeros(48)} | dict(list(load_file(first).items())[:1])
    save_file(tensors, second)
    with pytest.raises(LlmqatError, match=r"holds .* twice, in model-.* and model-"):
        load_packed(sharded)


@pytest.mark.parametrize("weight_map", [{}, [], {"a": 3}, {"a": None}])
def test_an_index_without_a_map(sharded, weight_map):
    (sharded / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(LlmqatError, match=r"index\.json is damaged; copy it again"):
        load_packed(sharded)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        (f"{UP}.weight_packed", torch.int8, "weight_packed is I8 in the file, and has to be I32"),
        (f"{UP}.weight_packed", torch.float32, "weight_packed is F32 in the file, and has to be I32"),
        (f"{UP}.weight_scale", torch.int16, "weight_scale is I16, and has to be one of F64, F32, F16, BF16"),
        (f"{UP}.weight_shape", torch.int32, "weight_shape is I32 in the file, and has to be I64"),
        ("model.norm.weight", torch.int32, r"model\.norm\.weight is I32 in the file, and has to be BF16"),
        ("model.embed_tokens.weight", torch.uint8, r"embed_tokens\.weight is U8 in the file, and has to be BF16"),
    ],
)
def test_dtypes_are_checked_before_native_code_sees_them(packed, name, dtype, message):
    tensors = load_file(packed[1] / WEIGHTS)
    tensors[name] = torch.zeros(tensors[name].shape, dtype=dtype)
    save_file(tensors, packed[1] / WEIGHTS)
    with pytest.raises(LlmqatError, match=message):
        load_packed(packed[1])


def test_a_shape_that_is_not_the_layers(packed):
    tensors = load_file(packed[1] / WEIGHTS)
    tensors[f"{UP}.weight_shape"] = torch.tensor([1, 1])
    save_file(tensors, packed[1] / WEIGHTS)
    with pytest.raises(LlmqatError, match=r"up_proj\.weight_shape is \[1, 1\], and the layer is \[80, 48\]"):
        load_packed(packed[1])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scales_are_numbers(packed, value):
    tensors = load_file(packed[1] / WEIGHTS)
    tensors[f"{UP}.weight_scale"][3, 1] = value
    save_file(tensors, packed[1] / WEIGHTS)
    with pytest.raises(LlmqatError, match=r"up_proj\.weight_scale holds numbers that are not finite"):
        load_packed(packed[1])
