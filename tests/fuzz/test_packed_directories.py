"""Packed directories, damaged anywhere: each is refused in one line, or loads; and what loads with other logits than
before is a change that `verify` sees.

Every example runs in a child of its own, where native code may die and nothing is left behind.
"""

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.kernels.native import own_threads
from llmqat.models.loading import load_float, load_tokenizer
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from tests.fuzz.changes import changed
from tests.fuzz.children import in_child
from tests.fuzz.conftest import EXAMPLES

IDS = torch.tensor([[0, 17, 101, 3, 254, 9]])
FEW = settings(max_examples=max(1, EXAMPLES // 3))  # a model is loaded and proved for each
SECONDS = 120  # for what takes a fifth of one: the machine may be busy
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSON_FILES = ("config.json", "generation_config.json", "fingerprint.json", "tokenizer_config.json", "tokenizer.json")
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3", "F4", "X", "")
HOSTILE = (-1, 0, 1, 2, 255, 1 << 20, 1 << 31, 1 << 63, 1 << 70, -(1 << 63), 10**400, 1e308, float("nan"), 0.5)
TEXTS = (
    "",
    "int",
    "group",
    "channel",
    "re:(a+)+$",
    "re:.*",
    "../config.json",
    "\ud800",
    "\0",
    "Linear",
    "cuda",
    "eval",
)

scalars = st.none() | st.booleans() | st.sampled_from(HOSTILE) | st.sampled_from(TEXTS) | st.text(max_size=8)
keys = st.text(max_size=6) | st.sampled_from(["auto_map", "quantization_config", "llmqat", "rope_scaling"])
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@pytest.fixture(scope="module", params=["sym", "asym"])
def directory(request, model_dir, tmp_path_factory):
    """A packed model with its tokenizer, and the logits that belong to it."""
    model = load_float(str(model_dir))
    prepare(model, QuantScheme(4, 16, request.param == "sym"))
    path = save_packed(model, tmp_path_factory.mktemp("packed") / request.param, load_tokenizer(str(model_dir)))
    with own_threads():  # as in a child
        return path, logits_of(path)


@torch.no_grad()
def logits_of(path):
    """The logits of a packed directory on fixed tokens."""
    return load_packed(path, torch.float32)(input_ids=IDS).logits


def outcome(path, expected):
    """What happened to a directory: refused and why, or whether `verify` accepts it and its logits are the same."""
    try:
        same = torch.equal(logits_of(path), expected)
        load_tokenizer(str(path))
        accepted = verify(path, logits=False).ok
    except LlmqatError as error:
        return {"refused": str(error)}
    return {"accepted": accepted, "same": same}


def check(original, changed_files):
    """Load a copy of the directory in which some files hold other bytes, are links (a path), or are gone (None)."""
    path, expected = original
    copied = path.with_name("copy")
    shutil.rmtree(copied, ignore_errors=True)
    shutil.copytree(path, copied)
    for name, content in changed_files.items():
        (copied / name).unlink(missing_ok=True)
        if isinstance(content, bytes):
            (copied / name).write_bytes(content)
        elif content is not None:
            (copied / name).symlink_to(content)
    found = in_child(outcome, copied, expected, seconds=SECONDS)
    if "refused" in found:
        assert "\n" not in found["refused"]
        assert len(found["refused"]) < 1200
    else:
        assert found["same"] or not found["accepted"], "verify accepts a model with other logits"
    return found


def parted(raw):
    """Header and data of a safetensors file."""
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def joined(header, data):
    """Inverse of `parted`."""
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def other_header(header, draw):
    """A header with one change that the format allows, so that it comes through to llmqat, or any other one."""
    result = copy.deepcopy(header)
    first, second = (draw(st.sampled_from([name for name in header if name != "__metadata__"])) for _ in range(2))
    kind = draw(st.sampled_from(["any", "dtype", "shape", "swap", "rename", "offsets", "exchange"]))
    if kind == "any":
        return changed(header, draw, values, keys)
    if kind == "dtype":
        result[first]["dtype"] = draw(st.sampled_from(DTYPES))
    elif kind == "shape":
        shape = list(result[first]["shape"])
        options = [shape[::-1], [1, *shape], [*shape, 1], [torch.Size(shape).numel()], shape[:-1], [*shape, 0]]
        result[first]["shape"] = draw(st.sampled_from(options) | st.lists(st.sampled_from(HOSTILE), max_size=3))
    elif kind == "swap":
        result[first], result[second] = result[second], result[first]
    elif kind == "rename":
        result[draw(st.text(max_size=8) | st.just(second + ".x"))] = result.pop(first)
    elif kind == "offsets":
        result[first]["data_offsets"] = draw(st.lists(st.sampled_from(HOSTILE), max_size=3))
    else:
        result[first]["data_offsets"] = result[second]["data_offsets"]
    return result


def test_an_unchanged_copy(directory):
    """What the others are compared with."""
    assert check(directory, {}) == {"accepted": True, "same": True}


@FEW
@given(data=st.data())
def test_headers(directory, data):
    """Names, dtypes, shapes and offsets of tensors."""
    header, tensors = parted((directory[0] / WEIGHTS).read_bytes())
    check(directory, {WEIGHTS: joined(other_header(header, data.draw), tensors)})


@FEW
@given(data=st.data())
def test_numbers(directory, data):
    """Codes, scales, zero points, shapes, embeddings and norms: a few bytes, or all of a tensor."""
    header, tensors = parted((directory[0] / WEIGHTS).read_bytes())
    name = data.draw(st.sampled_from([name for name in header if name != "__metadata__"]))
    start, end = header[name]["data_offsets"]
    raw = bytearray(tensors)
    if data.draw(st.booleans()):
        raw[start:end] = bytes([data.draw(st.integers(0, 255))]) * (end - start)
    else:
        at = data.draw(st.integers(start, end - 1))
        raw[at] ^= 1 << data.draw(st.integers(0, 7))
    check(directory, {WEIGHTS: joined(header, bytes(raw))})


@FEW
@given(data=st.data())
def test_json_files(directory, data):
    """Values of a wrong kind, huge ones, and lost keys in configs, tokenizer and fingerprint."""
    name = data.draw(st.sampled_from(JSON_FILES + ("config.json",) * 5))
    parsed = json.loads((directory[0] / name).read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        parsed = changed(parsed, data.draw, values, keys)
    check(directory, {name: json.dumps(parsed).encode()})


@FEW
@given(data=st.data())
def test_files(directory, data):
    """Files that are cut, of other bytes, gone, or links; and indices that are there or say what is not so."""
    name = data.draw(st.sampled_from((*JSON_FILES, WEIGHTS, INDEX)))
    source = directory[0] / (WEIGHTS if name == INDEX else name)
    whole = source.read_bytes()
    kind = data.draw(st.sampled_from(["cut", "other", "gone", "link", "index"]))
    if kind == "index":
        weight_map = dict.fromkeys(parted((directory[0] / WEIGHTS).read_bytes())[0], "a.safetensors")
        weight_map.pop("__metadata__", None)
        index = {"metadata": {}, "weight_map": weight_map}
        index = changed(index, data.draw, values, keys) if data.draw(st.booleans()) else index
        moved = {"a.safetensors": (directory[0] / WEIGHTS).read_bytes(), WEIGHTS: None}
        check(directory, {**moved, INDEX: json.dumps(index).encode()})
        return
    links = st.sampled_from([Path("/etc/hostname"), Path("/"), Path("nowhere"), Path(name), Path("/dev/null"), source])
    contents = {
        "cut": lambda: whole[: data.draw(st.integers(0, len(whole) - 1))],
        "other": lambda: data.draw(st.binary(max_size=40) | st.sampled_from([b"{}", b"[]", b"null", b"[" * 50_000])),
        "gone": lambda: None,
        "link": lambda: data.draw(links),
    }
    check(directory, {name: contents[kind]()})
