"""The contents of a packed file, derived from a trained model once: what is written, hashed, counted and compared."""

from collections.abc import Container, Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from llmqat.algorithms.activation_ranges import check_ranges
from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.formats.conv1d import to_conv1d_layout
from llmqat.mapped import Disk
from llmqat.models.experts import file_name
from llmqat.models.patcher import OnGrid, quantized_layers, transformers_model
from llmqat.models.ties import possible_ties, shared_ties
from llmqat.nn.embedding import FakeQuantEmbedding
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import check_storable


@dataclass(frozen=True)
class Contents:
    """A trained model as its packed file holds it.

    Attributes:
        model: the trained model.
        layers: its layers on the grid, packed, by their names in the model and in its order.
        hashes: of codes, scale, zero point and input scale of each, from before they were packed.
        state: every tensor of the file by its name there: codes and scales of the layers, everything else in the
            storage dtype. A tied tensor appears once, under the name it is tied to.
    """

    model: nn.Module
    layers: dict[str, PackedLinear]
    hashes: fingerprint.Layers
    state: dict[str, Tensor]

    @cached_property
    def tensor_hashes(self) -> dict[str, str]:
        """Dtype, shape and hash of every tensor of `state`."""
        return fingerprint.tensor_hashes(self.state)


def contents_of(model: nn.Module, disk: Disk | None = None) -> Contents:
    """The contents of the file that `model` packs to; the model itself is left alone.

    Args:
        model: prepared; a `PeftModel` too, whose adapters go into the codes.
        disk: where packed layers go, one after the other; None keeps them in memory.

    Raises:
        LlmqatError: if no layer is quantized, static activations have no range, or a tensor holds NaN, infinity, or
            values too large for the storage dtype.
    """
    dtype = storage_dtype(model)
    check_ranges(model)
    on_grid, root, lookups = quantized_layers(model), transformers_model(model), tied_head(model)
    state = _float_parts(model, {*(own.name for own in on_grid), *lookups.values()}, dtype)
    layers: dict[str, PackedLinear] = {}
    hashes: fingerprint.Layers = {}
    for own in on_grid:
        layers[own.name], hashes[own.name] = _packed(own)
        if disk is not None:
            put_on_disk(layers[own.name], disk)
        tensors = _tensors(own, layers[own.name], lookups.get(own.name, own.name))
        state |= tensors if disk is None else {key: disk.put(tensor) for key, tensor in tensors.items()}
    return Contents(model, layers, hashes, {file_name(root, name): tensor for name, tensor in state.items()})


def put_on_disk(packed: PackedLinear, disk: Disk) -> None:
    """Let a packed layer have its tensors on the disk."""
    for name, tensor in list(packed.named_buffers()):
        setattr(packed, name, disk.put(tensor))


def storage_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of scales and float parts in the file.

    Raises:
        LlmqatError: if no layer is quantized.
    """
    layers = quantized_layers(model)
    if not layers:
        raise LlmqatError("nothing to pack: no layer of this model is quantized; call llmqat.prepare first")
    return layers[0].layer.storage_dtype


def tied_head(model: nn.Module) -> dict[str, str]:
    """Name of the output head on the grid -> name of the embedding tied to it; empty if there is none."""
    root = transformers_model(model)
    embedding, head = root.get_input_embeddings(), root.get_output_embeddings()
    if not isinstance(embedding, FakeQuantEmbedding):
        return {}
    names = {id(module): name for name, module in root.named_modules()}
    return {names[id(head)]: names[id(embedding)]}


def tied_tensors(model: nn.Module) -> set[str]:
    """Names of tensors that readers find under the name they are tied to: all that the family ties, if each of them is
    one tensor with that in this model, else none, and the config says so."""
    root = transformers_model(model)
    shared = possible_ties(root) if tied_head(model) else shared_ties(root)
    return set(shared) if shared.keys() == possible_ties(root).keys() else set()


def is_inside(name: str, modules: Container[str]) -> bool:
    """Whether `name` is that of something below one of `modules`."""
    path = name.split(".")
    return any(".".join(path[:depth]) in modules for depth in range(1, len(path)))


def _float_parts(model: nn.Module, on_grid: set[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors outside the modules `on_grid`, by their names in the model, floating ones in `dtype`."""
    state: dict[str, Tensor] = {}
    elsewhere, root = tied_tensors(model), transformers_model(model)
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    for name, tensor in root.state_dict().items():
        if name in elsewhere or is_inside(name, on_grid):
            continue
        if name in parameters:  # a buffer may hold -inf on purpose, as masks do
            check_storable(tensor, dtype, name)
        state[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
    return state


def _packed(own: OnGrid) -> tuple[PackedLinear, dict[str, str | None]]:
    """A layer packed, and the hashes of what was packed."""
    own.check_storable()
    codes, layer = own.codes(), own.layer
    packed = PackedLinear.from_fake_quant(layer, codes)
    return packed, fingerprint.layer_hashes(
        codes, layer.stored_scale(), layer.stored_zero_point(), layer.stored_act_scale()
    )


def _tensors(own: OnGrid, packed: PackedLinear, name: str) -> dict[str, Tensor]:
    """Tensors of a packed layer by their names in the file, where the layer is called `name`."""
    tensors = packed.state_dict()
    if own.layer.transposed:
        tensors = to_conv1d_layout(tensors, own.layer.scheme.bits)
    return {f"{name}.{key}": value.cpu().contiguous() for key, value in tensors.items()}


def layer_sizes(layers: Iterable[PackedLinear]) -> dict[str, float]:
    """Bytes of the quantized layers' weights, float and packed, and stored bits per weight."""
    weights = packed_bytes = float_bytes = 0
    for layer in layers:
        tensors = [layer.weight_packed, layer.weight_scale, layer.weight_zero_point]
        packed_bytes += sum(tensor.nbytes for tensor in tensors if tensor is not None)
        weights += layer.out_features * layer.in_features
        float_bytes += layer.out_features * layer.in_features * layer.weight_scale.itemsize
    return {"float_bytes": float_bytes, "packed_bytes": packed_bytes, "bits_per_weight": 8 * packed_bytes / weights}
