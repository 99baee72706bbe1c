"""Compare what holds no codes in an exported model with what `export` makes of its packed directory.

That is float parts, config, and what turns text into tokens; `llmqat.formats.importing.exported` is for codes.
"""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import METHOD
from llmqat.formats.directory import TEXT_FILES, model_files
from llmqat.formats.export.gguf import FILE
from llmqat.formats.export.holds import HOLDS, PACKED
from llmqat.formats.export.onnx_graph import GRAPH, SETTINGS, nodes_of, tensors_of
from llmqat.formats.weights import read_tensors
from llmqat.models.gguf_file import opened

CONFIG = "config.json"
OWN_FACTS = ("GGUF.", "general.name")  # how the file is laid out, and the name of a folder


class Parts(NamedTuple):
    """An exported model in parts that can be compared.

    Attributes:
        tensors: digest of dtype, shape and bytes by name, of float parts.
        texts: digest of what turns text into tokens, by name: files, or metadata of a GGUF file.
        facts: what config.json, or the metadata of a GGUF file, says, by key.
    """

    tensors: dict[str, str]
    texts: dict[str, str]
    facts: dict[str, str]


def format_of(directory: Path) -> str:
    """The format of an exported model, or `PACKED` for a packed directory.

    Raises:
        LlmqatError: if the directory holds neither.
    """
    if (directory / FILE).exists():
        return "gguf"
    if (directory / GRAPH).exists():
        return "onnx"
    config = _config(directory)
    if "quantization" in config:
        return "mlx"
    found = config.get("quantization_config", {"quant_method": "dense"})
    method = str(found.get("quant_method") if isinstance(found, dict) else found)
    if method not in (*HOLDS, METHOD):
        raise LlmqatError(f"{directory} is a {method} model, which is no format of llmqat export; leave --against out")
    return PACKED if method == METHOD else method


def parts_of(directory: Path, decoded: Collection[str]) -> Parts:
    """The parts of an exported model, without its tensors `decoded`, which hold codes.

    Raises:
        LlmqatError: if a file is missing, truncated or damaged.
    """
    if (directory / FILE).exists():
        return _parts_of_gguf(directory / FILE, decoded)
    if (directory / GRAPH).exists():
        return _parts_of_onnx(directory, decoded)
    tensors = {name: _digest(tensor) for name, tensor in read_tensors(directory) if name not in decoded}
    return Parts(tensors, _texts(directory), _said(_config(directory)))


def _texts(directory: Path) -> dict[str, str]:
    names = sorted(model_files(directory, TEXT_FILES))
    return {name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in names}


def _said(config: dict[str, Any]) -> dict[str, str]:
    return {key: json.dumps(value) for key, value in config.items()}


def _parts_of_gguf(path: Path, decoded: Collection[str]) -> Parts:
    reader = opened(path)
    tensors = {}
    for tensor in reader.tensors:
        if tensor.name not in decoded:
            digest = _digest(torch.from_numpy(tensor.data.copy()))
            tensors[tensor.name] = f"{tensor.tensor_type.name} {digest}"
    said = {key: str(field.contents()) for key, field in reader.fields.items() if not key.startswith(OWN_FACTS)}
    texts = {key: value for key, value in said.items() if key.startswith("tokenizer.")}
    return Parts(tensors, texts, {key: value for key, value in said.items() if key not in texts})


def _parts_of_onnx(directory: Path, decoded: Collection[str]) -> Parts:
    tensors = {name: _digest(tensor) for name, tensor in tensors_of(directory) if name not in decoded}
    return Parts(tensors, _texts(directory), nodes_of(directory) | _said(_config(directory, SETTINGS)))


def differences(found: Parts, right: Parts) -> Iterator[str]:
    """One line for each kind of difference, with the names of the first."""
    lacking = sorted(right.tensors.keys() - found.tensors.keys())
    beyond = sorted(found.tensors.keys() - right.tensors.keys())
    if lacking:
        yield f"lacks {_named(lacking)}"
    if beyond:
        yield f"holds {_named(beyond)}, which the packed model does not have"
    for words, field in (
        ("holds other numbers in", "tensors"),
        ("has another tokenizer, by", "texts"),
        ("is another model, by", "facts"),
    ):
        own, expected = getattr(found, field), getattr(right, field)
        names = own.keys() & expected.keys() if field == "tensors" else own.keys() | expected.keys()
        other = sorted(name for name in names if own.get(name) != expected.get(name))
        if other:
            yield f"{words} {_named(other)}"


def _named(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _digest(tensor: Tensor) -> str:
    """Digest of dtype, shape and bytes."""
    head = f"{tensor.dtype} {list(tensor.shape)} ".encode()
    return hashlib.sha256(head + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def _config(directory: Path, name: str = CONFIG) -> dict[str, Any]:
    try:
        config = json.loads((directory / name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LlmqatError(
            f"{directory} holds no exported model: neither {FILE} nor a {name} that can be read; give the output of "
            "llmqat export"
        ) from error
    if not isinstance(config, dict):
        raise LlmqatError(f"{directory / name} is damaged; export the model again")
    return config
