"""Facts from the weight files of a float model, whatever its config.json says: dtypes, and shared heads."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmqat.errors import LlmqatError, error_text
from llmqat.mapped import DTYPES

PICKLES = ("pytorch_model*.bin", "model*.bin")
# Names in safetensors headers of the dtypes that a float model can be trained from, and be stored in again.
FLOATS = {name: dtype for name, dtype in DTYPES.items() if dtype.is_floating_point}
OTHER_FLOATS = ("F8", "F6", "F4")


class Header(NamedTuple):
    """A tensor as the header of its file describes it: dtype, as safetensors spells it, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers the tensor has."""
        return torch.Size(self.shape).numel()


def headers(path: Path) -> dict[str, Header]:
    """Dtype and shape of every tensor in a safetensors file; no tensor is read.

    Raises:
        SafetensorError: if the file is damaged.
    """
    with safe_open(path, framework="np") as file:
        parts = ((name, file.get_slice(name)) for name in file.keys())  # noqa: SIM118 - not a dict
        return {name: Header(part.get_dtype(), tuple(part.get_shape())) for name, part in parts}


def headers_of(directory: Path) -> Iterator[tuple[Path, dict[str, Header]]]:
    """The files from which transformers loads a float model, with their headers.

    Raises:
        LlmqatError: if one is damaged.
    """
    for path in float_weight_files(directory):
        try:
            yield path, headers(path)
        except (SafetensorError, OSError) as error:
            raise LlmqatError(
                f"cannot load the weights of {path}: {error_text(error)}; copy or download the model again"
            ) from error


def float_weight_files(directory: Path) -> list[Path]:
    """The safetensors files from which transformers loads a float model; none if it has other files."""
    single = directory / "model.safetensors"
    if single.exists():
        return [single]
    index = directory / "model.safetensors.index.json"
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []  # transformers, which loads the weights, says what is wrong
    return [directory / name for name in names if (directory / name).exists()]


def stored_dtype(directory: Path, default: torch.dtype | None) -> torch.dtype:
    """The dtype that most numbers of a float model's weights are stored in; `default` if it has no weights to look at.

    Raises:
        LlmqatError: if a file is damaged, or the weights are stored in less than 16 bits without a quantization that
            says how.
    """
    floats = _float_counts(directory)
    if not floats:
        return default or torch.float32
    most = max(floats, key=lambda name: floats[name])
    if most not in FLOATS:
        raise LlmqatError(
            f"most weights of {directory} are stored as {most}, and config.json has no quantization_config that says "
            f"how to read them; start from a model in {', '.join(FLOATS)}"
        )
    return FLOATS[most]


def stores_only(directory: Path, dtype: torch.dtype) -> bool:
    """Whether all of a float model's weights, as far as files tell, are stored in `dtype`.

    Raises:
        LlmqatError: if a file is damaged.
    """
    return [FLOATS.get(name) for name in _float_counts(directory)] == [dtype]


def _float_counts(directory: Path) -> dict[str, int]:
    """How many numbers of a model's weights are stored in each floating dtype, as safetensors spells it."""
    counts: Counter[str] = Counter()
    for _, found in headers_of(directory):
        for header in found.values():
            counts[header.dtype] += header.elements
    for path in [] if counts else [path for pattern in PICKLES for path in sorted(directory.glob(pattern))]:
        counts.update(_pickled(path))
    return {name: count for name, count in counts.items() if name in FLOATS or name.startswith(OTHER_FLOATS)}


def _pickled(path: Path) -> Counter[str]:
    """Elements by dtype of a file that torch wrote; none where torch cannot read tensors alone from it."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    counts: Counter[str] = Counter()
    try:
        state: Any = torch.load(path, map_location="meta", weights_only=True, mmap=True)
    except Exception:  # an older format, or damaged: transformers, which loads it, says so
        return counts
    for tensor in state.values() if isinstance(state, dict) else ():
        if isinstance(tensor, Tensor) and tensor.dtype in names:
            counts[names[tensor.dtype]] += tensor.numel()
    return counts


def tensor_of(directory: Path, name: str) -> Tensor | None:
    """The tensor `name` of a float model as it is stored; None if no file has it."""
    for path in float_weight_files(directory):
        if name in headers(path):
            with safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
                return tensor
    return None


def separate_heads(directory: Path, ties: dict[str, str]) -> Iterator[str]:
    """The tied tensors (`ties`: name -> the name it is tied to) that the files hold beside the other one, and
    with other values: what transformers keeps apart, whatever the config says."""
    for name, source in ties.items():
        own, other = tensor_of(directory, name), tensor_of(directory, source)
        if own is not None and other is not None and not torch.equal(own, other):
            yield name
