"""Read the layers on a grid, and every tensor, of a graph that onnxruntime-genai's model builder wrote."""

import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmqat.errors import LlmqatError, error_text

GRAPH, SETTINGS = "model.onnx", "genai_config.json"
# Layers of a block that one node may compute, in the order of their rows, by a name for all of them.
TOGETHER = {
    "qkv": ("q_proj", "k_proj", "v_proj", "qkv_proj"),
    "gate_up": ("gate_proj", "up_proj", "gate_up_proj"),
    "o": ("o_proj",),
    "down": ("down_proj",),
}
LAYER = re.compile(r"layers[./](\d+)[./].*?([a-z_]+_proj)\b")


class OnGrid(NamedTuple):
    """The numbers of a layer, or of several of the same input, one after the other.

    Attributes:
        codes: unsigned, ``(out, in)``, uint8.
        scale: ``(out, groups)``, float32.
        zero_point: unsigned, ``(out, groups)``, uint8.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def place_of(name: str) -> str:
    """The block and part of a layer or node; its name where that is none of `TOGETHER`."""
    found = LAYER.search(name)
    part = next((part for part, names in TOGETHER.items() if found and found[2] in names), None)
    return name if found is None or part is None else f"block {found[1]}, {part}"


def by_place(names: Iterable[str]) -> dict[str, list[str]]:
    """Names of layers or nodes, in their order, by the place of each."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(place_of(name), []).append(name)
    return found


def joined(layers: Iterable[OnGrid]) -> OnGrid:
    """Layers of the same input, one after the other."""
    return OnGrid(*map(torch.cat, zip(*layers, strict=True)))


class GridNodes(NamedTuple):
    """The nodes of a graph that compute with codes.

    Attributes:
        layers: what reads the numbers of each, by its name.
        tensors: names of the tensors that hold these.
    """

    layers: dict[str, Callable[[], OnGrid]]
    tensors: set[str]


def nodes_on_grid(directory: Path) -> GridNodes:
    """Every node of a graph that computes with codes.

    Raises:
        LlmqatError: if the graph has others whose weights are codes.
    """
    graph = opened(directory).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    rounded = next((node.name for node in graph.node if node.op_type == "GatherBlockQuantized"), None)
    if rounded is not None:
        raise LlmqatError(f"{directory / GRAPH} has float weights rounded to codes in {rounded}")

    def read(node: Any) -> OnGrid:
        numbers = {attribute.name: attribute.i for attribute in node.attribute}
        return _unpacked(numbers, *(_values(tensors[name], directory) for name in list(node.input)[1:4]))

    nodes = [node for node in graph.node if node.op_type == "MatMulNBits"]
    names = {name for node in nodes for name in list(node.input)[1:4]}
    return GridNodes({node.name: partial(read, node) for node in nodes}, names)


def _unpacked(numbers: dict[str, int], packed: np.ndarray, scale: np.ndarray, zero: np.ndarray) -> OnGrid:
    """Codes of ``(out, blocks, bytes)``, lowest bits first, and zero points of rows that end in a whole byte."""
    rows, columns, bits = numbers["N"], numbers["K"], numbers["bits"]
    groups = -(-columns // numbers["block_size"])
    codes = _integers(packed.reshape(rows, -1), bits)[:, :columns]
    zero_point = _integers(zero.reshape(rows, -1), bits)[:, :groups]
    return OnGrid(codes, torch.from_numpy(scale.reshape(rows, groups)), zero_point)


def _integers(packed: np.ndarray, bits: int) -> Tensor:
    parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.from_numpy(np.stack(parts, -1).reshape(len(packed), -1))


def tensors_of(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a graph keeps, by its name."""
    for tensor in opened(directory).graph.initializer:
        yield tensor.name, torch.from_numpy(_values(tensor, directory))


def nodes_of(directory: Path) -> dict[str, str]:
    """Every node of a graph in text, with its inputs and attributes, by its name."""
    return {node.name: str(node) for node in opened(directory).graph.node}


def opened(directory: Path) -> Any:
    """The graph of an exported directory, its weights left on disk.

    Raises:
        LlmqatError: if it is damaged, or the onnx package is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise LlmqatError(f"{directory / GRAPH} needs the onnx package: pip install 'llmqat[onnx]'") from error
    try:
        return onnx.load(directory / GRAPH, load_external_data=False)
    except Exception as error:
        raise LlmqatError(f"{directory / GRAPH} is damaged: {error_text(error)}") from error


def _values(tensor: Any, directory: Path) -> np.ndarray:
    from onnx import numpy_helper

    try:
        found: np.ndarray = numpy_helper.to_array(tensor, base_dir=str(directory)).copy()  # a file's are read-only
    except Exception as error:
        raise LlmqatError(f"{directory / GRAPH} lacks the values of {tensor.name}: {error_text(error)}") from error
    return found
