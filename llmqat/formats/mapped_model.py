"""Load a float model whose matrices stay in its safetensors: nothing of their size is in memory until it is used."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.compat.transformers import names_in_model
from llmqat.errors import LlmqatError
from llmqat.formats.reader import generation_config
from llmqat.formats.weights import read_mapped
from llmqat.mapped import Disk
from llmqat.models.experts import fused_experts
from llmqat.models.foreign import local_directory
from llmqat.models.loading import REMEMBERED, load_config, load_empty, resolve_weights
from llmqat.nn.linear_like import LINEAR_LAYERS, is_transposed

LOW_MEMORY = "leave --low-memory out"


def load_mapped(name: str, disk: Disk) -> PreTrainedModel:
    """The model of `llmqat.models.loading.load_float`, its matrices mapped, its vectors (norms, biases) in memory.

    Args:
        name: Hub id, directory, GGUF file or alias.
        disk: where matrices go that the file has in another layout than a layer on its grid.

    Raises:
        LlmqatError: see `load_config`; or if its weights are damaged, are not safetensors, or have other names, shapes
            or dtypes there than in the model.
    """
    load_config(name)  # says what is wrong with a name better than a download
    directory = local_directory(resolve_weights(name))
    if not any(directory.glob("*.safetensors")):
        raise LlmqatError(
            f"model {name} has no safetensors, which can be read in parts; load it once with transformers and write it "
            "again with save_pretrained"
        )
    model, stored = load_empty(name)
    if fused_experts(model):
        raise LlmqatError(f"--low-memory does not know how to split fused experts yet: {LOW_MEMORY}")
    for key, tensor in _tensors_for(model, directory).items():
        _put(model, key, tensor, disk)
    model.tie_weights()
    lost = [key for key, parameter in model.named_parameters() if parameter.is_meta]
    if lost:
        raise LlmqatError(
            f"cannot load the weights of {name}: they lack {', '.join(lost[:3])}; copy or download it again"
        )
    if (directory / "generation_config.json").exists():
        model.generation_config = generation_config(directory)
    setattr(model, REMEMBERED, stored)
    model.eval()
    return model


def _tensors_for(model: PreTrainedModel, directory: Path) -> dict[str, Tensor]:
    """The mapped tensors of a directory by their names in `model`; those that it does not have are left out."""
    found, known = dict(read_mapped(directory)), model.state_dict()
    named = {own: found[key] for key, own in names_in_model(model, found).items() if own in known}
    for key, tensor in named.items():
        if tensor.shape != known[key].shape or tensor.is_floating_point() != known[key].is_floating_point():
            raise LlmqatError(
                f"{directory} holds {key} as {tensor.dtype} {list(tensor.shape)}, and the model wants "
                f"{list(known[key].shape)}: it cannot be used where it lies; {LOW_MEMORY}"
            )
    return named


def _put(model: PreTrainedModel, key: str, tensor: Tensor, disk: Disk) -> None:
    """Give `model` the tensor `key`: what trains is a vector, and is copied."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if tensor.ndim < 2:
        tensor = tensor.clone()
    elif isinstance(module, LINEAR_LAYERS) and is_transposed(module):
        tensor = disk.put(tensor.T).T
    if isinstance(getattr(module, name), nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, name, tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor)
