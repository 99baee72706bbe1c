"""Write a trained model as a packed directory: compressed-tensors ``pack-quantized`` in sharded safetensors."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.algorithms.activation_ranges import check_ranges
from llmqat.errors import LlmqatError
from llmqat.files import replacing
from llmqat.formats import fingerprint
from llmqat.formats.compressed_tensors import KV_BITS_KEY, OWN_KEY, config_of
from llmqat.formats.conv1d import to_conv1d_layout
from llmqat.formats.directory import SEAL, check_own, model_files, stale_files
from llmqat.formats.readback import read_back
from llmqat.formats.weights import INDEX
from llmqat.models.experts import file_name, routers
from llmqat.models.patcher import plain_model, quantized_layers
from llmqat.models.ties import possible_ties, set_tied, shared_ties
from llmqat.nn.embedding import FakeQuantEmbedding
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.quant.affine import check_storable

MAX_SHARD_SIZE = "5GB"


def storage_dtype(model: torch.nn.Module) -> torch.dtype:
    """The dtype of scales and float parts in the file.

    Raises:
        LlmqatError: if no layer is quantized.
    """
    layers = quantized_layers(model)
    if not layers:
        raise LlmqatError("nothing to pack: no layer of this model is quantized; call llmqat.prepare first")
    return layers[0].layer.storage_dtype


def tied_head(model: torch.nn.Module) -> dict[str, str]:
    """Name of the output head on the grid -> name of the embedding tied to it; empty if there is none."""
    root = plain_model(model)
    embedding, head = root.get_input_embeddings(), root.get_output_embeddings()
    if not isinstance(embedding, FakeQuantEmbedding):
        return {}
    names = {id(module): name for name, module in root.named_modules()}
    return {names[id(head)]: names[id(embedding)]}


def tied_tensors(model: torch.nn.Module) -> set[str]:
    """Names of tensors that readers find under the name they are tied to: all that the family ties, if each of them is
    one tensor with that in this model, else none, and the config says so."""
    root = plain_model(model)
    shared = possible_ties(root) if tied_head(model) else shared_ties(root)
    return set(shared) if shared.keys() == possible_ties(root).keys() else set()


def packed_state(model: torch.nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Tensors of the packed file by their names there: codes and scales of layers on the grid, everything else in the
    storage dtype.

    A tied tensor appears once, under the name it is tied to: a quantized matrix, too, under that of the embedding. Only
    names that start with `prefix` are looked at, and tensors on the meta device are not there.

    Raises:
        LlmqatError: if a tensor holds NaN or infinity, or values too large for the storage dtype.
    """
    dtype = storage_dtype(model)
    on_grid = {layer.name: layer for layer in quantized_layers(model)}
    layers = {name: own for name, own in on_grid.items() if name.startswith(prefix) and not own.layer.weight.is_meta}
    lookups = tied_head(model)
    state: dict[str, Tensor] = {}
    elsewhere, root = tied_tensors(model), plain_model(model)
    parameters = {name for name, _ in root.named_parameters(remove_duplicate=False)}
    for name, tensor in root.state_dict().items():
        if name in elsewhere or not name.startswith(prefix) or _inside(name, [*on_grid, *lookups.values()]):
            continue
        if not tensor.is_meta:
            if name in parameters:  # a buffer may hold -inf on purpose, as masks do
                check_storable(tensor, dtype, name)
            state[name] = (tensor.to(dtype) if tensor.is_floating_point() else tensor).cpu().contiguous()
    for name, own in layers.items():
        tensors, name = own.pack().state_dict(), lookups.get(name, name)
        if own.layer.transposed:
            tensors = to_conv1d_layout(tensors, own.layer.scheme.bits)
        state.update({f"{name}.{key}": value.cpu().contiguous() for key, value in tensors.items()})
    return {file_name(root, name): tensor for name, tensor in state.items()}


def packed_config(model: torch.nn.Module) -> Any:
    """The model's config with its architecture, dtype and `quantization_config`."""
    root = plain_model(model)
    layers, tied = {on_grid.name: on_grid.layer for on_grid in quantized_layers(model)}, tied_head(model)
    ignored = [n for n, m in root.named_modules() if isinstance(m, torch.nn.Linear) and not _inside(n, layers)]
    ignored += [file_name(root, name) for name in routers(root)]  # a Linear to other readers
    schemes = {tied.get(name, name): layer.scheme for name, layer in layers.items()}
    transposed = {name: layer.in_features for name, layer in layers.items() if layer.transposed}
    config = copy.deepcopy(root.config)
    config.architectures = [type(root).__name__]
    config.dtype = storage_dtype(model)
    if possible_ties(root):
        set_tied(config, bool(tied_tensors(model)))
    config.quantization_config = config_of(schemes, [*ignored, *tied], tied.values(), transposed)
    kv_bits = kv_bits_of(root)
    if kv_bits is not None:
        setattr(config, OWN_KEY, {KV_BITS_KEY: kv_bits})
    return config


def _inside(name: str, layers: Iterable[str]) -> bool:
    return any(name.startswith(layer + ".") for layer in layers)


def save_packed(model: PreTrainedModel, directory: str | Path, tokenizer: Any = None) -> Path:
    """Write `model` to `directory` as compressed-tensors ``pack-quantized``; the model itself is left alone.

    Args:
        model: prepared; a `PeftModel` too, whose adapters go into the codes.
        directory: made if need be. A model in it is replaced once all is written.
        tokenizer: saved beside it.

    Returns:
        the directory.

    Raises:
        LlmqatError: if no layer is quantized, static activations have no range, a tensor cannot be stored, or the
            directory cannot be written.
    """
    directory = Path(directory)
    check_ranges(model)
    check_own(directory)
    state = packed_state(model)
    shards = split_torch_state_dict_into_shards(state, max_shard_size=MAX_SHARD_SIZE)
    stale: list[str] = []
    with replacing(directory, seal=SEAL, owned=stale, first=fingerprint.NAME) as scratch:
        for filename, names in shards.filename_to_tensors.items():
            save_shard({name: state[name] for name in names}, scratch / filename)
        if shards.is_sharded:
            write_index(scratch, shards.metadata, shards.tensor_to_filename)
        hashes = fingerprint.fingerprint(model), fingerprint.tensor_hashes(state)
        stale += finish_model(model, scratch, directory, tokenizer, hashes)
    return directory


def save_shard(state: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file(state, path, metadata={"format": "pt"})


def write_index(directory: Path, metadata: dict[str, Any], weight_map: dict[str, str]) -> None:
    """Write which tensor is in which shard."""
    (directory / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1))


def finish_model(
    model: torch.nn.Module,
    scratch: Path,
    directory: Path,
    tokenizer: Any,
    hashes: tuple[fingerprint.Layers, dict[str, str]],
) -> list[str]:
    """Write what stands beside the weights in `scratch` (configs, tokenizer, fingerprint), and read all of it back.

    Args:
        model: whose weights they are.
        scratch: the new files.
        directory: where they will go.
        tokenizer: saved beside the weights, unless it is None.
        hashes: of layers and of tensors, for the fingerprint.

    Returns:
        names of the files in `directory` that are of an earlier model and have to go.

    Raises:
        LlmqatError: if the model could not be loaded again, or `directory` holds files of a model that is not llmqat's.
    """
    packed_config(model).save_pretrained(scratch)
    generation_config = getattr(plain_model(model), "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(scratch)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    fingerprint.write(scratch, *hashes)
    read_back(scratch)
    return stale_files(directory, model_files(scratch))
