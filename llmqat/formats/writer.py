"""Write a trained model as a packed directory: compressed-tensors ``pack-quantized`` in sharded safetensors."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.files import replacing
from llmqat.formats import fingerprint
from llmqat.formats.compressed_tensors import KV_BITS_KEY, OWN_KEY, config_of
from llmqat.formats.contents import Contents, contents_of, is_inside, storage_dtype, tied_head, tied_tensors
from llmqat.formats.directory import SEAL, check_own, model_files, stale_files
from llmqat.formats.export.check import layers_of, not_run
from llmqat.formats.readback import read_back
from llmqat.formats.weights import INDEX
from llmqat.models.coverage import HEAD, TIED_HEAD
from llmqat.models.experts import file_name, routers
from llmqat.models.patcher import quantized_layers, transformers_model
from llmqat.models.ties import possible_ties, set_tied
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.progress import log

MAX_SHARD_SIZE = "5GB"


def packed_config(model: torch.nn.Module) -> Any:
    """The model's config with its architecture, dtype and `quantization_config`."""
    root = transformers_model(model)
    layers, tied = {on_grid.name: on_grid.layer for on_grid in quantized_layers(model)}, tied_head(model)
    ignored = [n for n, m in root.named_modules() if isinstance(m, torch.nn.Linear) and not is_inside(n, layers)]
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
    return write_contents(contents_of(model), Path(directory), tokenizer)


def write_contents(contents: Contents, directory: Path, tokenizer: Any = None) -> Path:
    """Write a packed model to `directory`, in the place of the one that is there; see `save_packed`."""
    check_own(directory)
    if note := _not_run(contents):
        log(f"note: {note}")
    state = contents.state
    shards = split_torch_state_dict_into_shards(state, max_shard_size=MAX_SHARD_SIZE)
    stale: list[str] = []
    with replacing(directory, seal=SEAL, owned=stale, first=fingerprint.NAME) as scratch:
        for filename, names in shards.filename_to_tensors.items():
            save_shard({name: state[name] for name in names}, scratch / filename)
        if shards.is_sharded:
            write_index(scratch, shards.metadata, shards.tensor_to_filename)
        stale += finish_model(contents, scratch, directory, tokenizer)
    return directory


def _not_run(contents: Contents) -> str:
    """Which engines do not run the packed model, and the remedy."""
    root, tied = transformers_model(contents.model), tied_head(contents.model)
    head, modules = root.get_output_embeddings(), dict(root.named_modules())
    floats = [
        name
        for name, module in modules.items()
        if isinstance(module, torch.nn.Linear) and module is not head and not is_inside(name, contents.layers)
    ]
    packed = {tied.get(name, name): layer for name, layer in contents.layers.items()}
    roles = {name: TIED_HEAD if name in tied else HEAD for name, module in modules.items() if module is head}
    roles = {tied.get(name, name): role for name, role in roles.items()}
    return not_run(layers_of(packed, floats, roles), kv_bits_of(root))


def save_shard(state: dict[str, Tensor], path: Path) -> None:
    """Write one safetensors file."""
    save_file(state, path, metadata={"format": "pt"})


def write_index(directory: Path, metadata: dict[str, Any], weight_map: dict[str, str]) -> None:
    """Write which tensor is in which shard."""
    (directory / INDEX).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=1))


def finish_model(contents: Contents, scratch: Path, directory: Path, tokenizer: Any) -> list[str]:
    """Write what stands beside the weights in `scratch` (configs, tokenizer, fingerprint), and read all of it back.

    Args:
        contents: of the weights.
        scratch: the new files.
        directory: where they will go.
        tokenizer: saved beside the weights, unless it is None.

    Returns:
        names of the files in `directory` that are of an earlier model and have to go.

    Raises:
        LlmqatError: if the model could not be loaded again, or `directory` holds files of a model that is not llmqat's.
    """
    packed_config(contents.model).save_pretrained(scratch)
    generation_config = getattr(transformers_model(contents.model), "generation_config", None)
    if generation_config is not None:
        generation_config.save_pretrained(scratch)
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch)
    fingerprint.write(scratch, contents.hashes, contents.tensor_hashes)
    read_back(scratch)
    return stale_files(directory, model_files(scratch))
