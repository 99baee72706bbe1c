"""Decode the layers of an exported model, and find where they are not those of its packed directory.

What reads is not what writes: no code of the writers in `llmqat.formats.export` runs here, or one fault of theirs would
be in both, and nobody would see it. Expected numbers are those of the packed directory, as `PackedLinear` unpacks them.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError, shortened_list
from llmqat.formats.export.gguf import FILE
from llmqat.formats.export.onnx_graph import OnGrid, by_place, joined, nodes_on_grid
from llmqat.formats.export.source import Source
from llmqat.formats.importing.checkpoint import PARTS, READERS
from llmqat.formats.importing.gguf import INTEGERS, Tensors, integers_of, rotated
from llmqat.formats.importing.grids import FLOATS, group_size_of, part
from llmqat.formats.reader import quantization_of, read_config
from llmqat.formats.weights import read_mapped, read_tensors
from llmqat.models.experts import reads_experts
from llmqat.nn.expert_layout import Layout
from llmqat.nn.experts import SplitExperts
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.packing import unpack_rows

AGAIN = "export the model again"


class Numbers(NamedTuple):
    """Some numbers of a layer.

    Attributes:
        what: they are.
        found: decoded from the exported file.
        right: of the packed directory, as the format has them.
    """

    what: str
    found: Tensor
    right: Tensor

    def difference(self, layer: str) -> str:
        """How many differ, and the first; empty where none does."""
        if self.found.shape != self.right.shape:
            return f"holds {self.what} of shape {list(self.found.shape)} in {layer}, not {list(self.right.shape)}"
        found, right = self.found.float(), self.right.float()
        other = (found != right).nonzero()
        if not len(other):
            return ""
        at = tuple(other[0].tolist())
        first = f"{float(found[at]):.9g} at {list(at)} where {float(right[at]):.9g} was packed"
        return f"holds other {self.what} in {layer}, {len(other)} of {right.numel()}: {first}"


class Decoder(NamedTuple):
    """The layers of an exported model that are on a grid in its packed directory.

    Attributes:
        layers: what decodes each, in the order of the model; where a format runs several as one, those together.
        tensors: names of the tensors in the file that hold their codes, scales and zero points.
    """

    layers: dict[str, Callable[[], list[Numbers]]]
    tensors: set[str]


def layer_differences(decoder: Decoder) -> tuple[str, ...]:
    """One line that names the first layer with other numbers, or none that can be read, and counts those behind it; no
    line where all are equal."""
    wrong = []
    for name, decode in decoder.layers.items():
        try:
            line = next(filter(None, (numbers.difference(name) for numbers in decode())), "")
        except LlmqatError as error:
            line = f"cannot be read: {error}"
        if line:
            wrong.append(line)
    more = f", and others in {len(wrong) - 1} more layers" if len(wrong) > 1 else ""
    return (f"{wrong[0]}{more}",) if wrong else ()


def decoder_of(directory: Path, to: str, source: Source) -> Decoder:
    """The decoder of an exported model of the format `to`, beside the packed model `source`.

    Raises:
        LlmqatError: if the exported model is damaged.
    """
    return DECODERS[to](directory, source)


def _by_file_name(source: Source) -> dict[str, PackedLinear]:
    return {source.file_name(path): layer for path, layer in source.layers.items()}


def _checkpoint(directory: Path, source: Source) -> Decoder:
    """Decoder of GPTQ and AWQ."""
    config, tensors, layers = quantization_of(directory), dict(read_mapped(directory)), _by_file_name(source)
    check, zero_points, read = READERS[config["quant_method"]]
    check(config)

    def decode(name: str, layer: PackedLinear) -> list[Numbers]:
        zero_point = zero_points(tensors, name, config)
        found = read(tensors, name, config, zero_point)
        codes, scale, right = layer.unsigned()
        return [
            Numbers("codes", found.codes, codes),
            Numbers("scales", found.scale, scale.to(torch.float16)),
            Numbers("zero points", zero_point, right),
        ]

    names = {f"{name}.{part}" for name in layers for part in PARTS}
    return Decoder({name: partial(decode, name, layer) for name, layer in layers.items()}, names)


def _mlx(directory: Path, source: Source) -> Decoder:
    """Decoder of MLX, whose weights are ``code * scale + bias``."""
    grids: dict[str, Any] = read_config(directory)["quantization"]
    layers = _by_file_name(source)
    names = {f"{name}.{own}" for name in layers for own in ("weight", "scales", "biases")}
    tensors = {name: tensor for name, tensor in read_tensors(directory) if name in names}

    def decode(name: str, layer: PackedLinear) -> list[Numbers]:
        grid = grids.get(name, grids)
        words = part(tensors, f"{name}.weight", (torch.uint32,), (layer.out_features, -1))
        scale, bias = (part(tensors, f"{name}.{own}", FLOATS, (len(words), -1)) for own in ("scales", "biases"))
        columns = words.shape[1] * 32 // grid["bits"]
        group_size_of(columns, scale.shape[1], grid["group_size"], name)
        codes, right, zero_point = layer.unsigned()
        return [
            Numbers("codes", unpack_rows(words.view(torch.int32), grid["bits"], columns), codes),
            Numbers("scales", scale, right),
            Numbers("zero points", bias, (zero_point.double() * right.double()).neg().to(right.dtype)),
        ]

    return Decoder({name: partial(decode, name, layer) for name, layer in layers.items()}, names)


def _gguf(directory: Path, source: Source) -> Decoder:
    """Decoder of GGUF, whose blocks hold codes less their zero point."""
    config, layers = source.model.config, _by_file_name(source)
    tensors = Tensors.of(directory / FILE, config)

    def decode(name: str, layer: PackedLinear) -> list[Numbers]:
        tensor = tensors.find(name)
        if tensor is None or tensor.tensor_type.name not in INTEGERS:
            kind = "missing" if tensor is None else tensor.tensor_type.name
            raise LlmqatError(f"{directory / FILE}: {name} is {kind}, and has to be {', '.join(INTEGERS)}; {AGAIN}")
        integers, d = integers_of(tensor, rotated(name, config, tensors.family))
        codes, scale, zero_point = layer.unsigned()
        right = codes.short() - zero_point.short().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
        of_blocks = scale.to(torch.float16).repeat_interleave(max(1, d.shape[1] // scale.shape[1]), 1)
        return [Numbers("codes", integers, right), Numbers("scales", d, of_blocks)]

    names = {tensors.name_of(name) for name in layers}
    return Decoder({name: partial(decode, name, layer) for name, layer in layers.items()}, names)


def _onnx(directory: Path, source: Source) -> Decoder:
    """Decoder of a graph, a node of which may compute several layers.

    Raises:
        LlmqatError: if it has others on a grid than the packed model.
    """
    nodes, layers = nodes_on_grid(directory), _by_file_name(source)
    found, right = by_place(nodes.layers), by_place(layers)
    if found.keys() != right.keys():
        other = shortened_list(sorted(found.keys() ^ right.keys()))
        raise LlmqatError(f"{directory} has other layers on a grid than the packed model, by {other}; {AGAIN}")

    def decode(place: str) -> list[Numbers]:
        theirs = joined(nodes.layers[name]() for name in found[place])
        ours = joined(OnGrid(*layers[name].unsigned()) for name in right[place])
        whats = ("codes", "scales", "zero points")
        return [Numbers(*numbers) for numbers in zip(whats, theirs, ours, strict=True)]

    return Decoder({place: partial(decode, place) for place in right}, nodes.tensors)


def _dense(directory: Path, source: Source) -> Decoder:
    """Decoder of a float checkpoint, which holds neither codes nor scales: only their product, rounded once to the
    dtype of the scales. Experts may lie in one tensor for a block."""
    tensors, fused = dict(read_mapped(directory)), _fused(source)

    def decode(path: str, layer: PackedLinear) -> list[Numbers]:
        if path in fused:
            experts, index, projection = fused[path]
            layout = _layout(source, experts)
            parts = {name: part(tensors, f"{experts}.{name}", FLOATS, (-1, -1, -1)) for name in layout.names}
            found = layout.apart(parts, int(index))[projection][0]
        else:
            found = part(tensors, f"{source.file_name(path)}.weight", FLOATS, (-1, -1))
            found = found.T if layer.stored_transposed else found
        codes, scale, zero_point = layer.unsigned()
        shifted = codes.float().unflatten(1, (scale.shape[1], -1)) - zero_point.float().unsqueeze(-1)
        right = (shifted * scale.float().unsqueeze(-1)).flatten(1).to(scale.dtype)  # exact before its one rounding
        return [Numbers("weights", found, right)]

    names = {f"{source.file_name(path)}.weight" for path in source.layers if path not in fused}
    names |= {f"{path[0]}.{name}" for path in fused.values() for name in _layout(source, path[0]).names}
    return Decoder(
        {source.file_name(path): partial(decode, path, layer) for path, layer in source.layers.items()}, names
    )


def _fused(source: Source) -> dict[str, list[str]]:
    """Layers of experts that lie in one tensor for a block -> module of the experts, which of them, and projection."""
    if reads_experts(source.model):
        return {}
    experts = {name for name, module in source.model.named_modules() if isinstance(module, SplitExperts)}
    apart = {path: path.rsplit(".", 2) for path in source.layers}
    return {path: parts for path, parts in apart.items() if parts[0] in experts}


def _layout(source: Source, experts: str) -> Layout:
    """How the weights of experts lie in their tensors."""
    module = source.model.get_submodule(experts)
    assert isinstance(module, SplitExperts)
    return module.layout._replace(biased=False)


# Formats of `llmqat export`.
DECODERS = {"dense": _dense, "gguf": _gguf, "gptq": _checkpoint, "awq": _checkpoint, "mlx": _mlx, "onnx": _onnx}
