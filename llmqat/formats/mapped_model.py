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
from llmqat.models.experts import expert_layers, fused_experts, module_name, split_experts
from llmqat.models.foreign import local_directory
from llmqat.models.loading import REMEMBERED, load_config, load_empty, resolve_weights
from llmqat.nn.expert_layout import Layout
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
    tensors = _tensors_for(model, directory)
    split_experts(model)
    for key, tensor in tensors.items():
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
    """The mapped tensors of a directory by their names in `model`, once its experts are split; those that it does not
    have are left out."""
    found, experts, known = dict(read_mapped(directory)), fused_experts(model), model.state_dict()
    for name, layout in experts.items():
        layers = expert_layers(name, model.get_submodule(name), layout)
        known |= {f"{layer}.weight": torch.empty(shape, device="meta") for layer, shape in layers}
    named: dict[str, Tensor] = {}
    for key, (renamed, converted) in names_in_model(model, found, apart=bool(experts)).items():
        own = _own_name(model, renamed, known)
        if own in known:
            _check_usable(found[key], known[own], converted, f"{directory} holds {key}")
            named[own] = found[key]
    for name, layout in experts.items():
        fused = {own: named.pop(f"{name}.{own}", None) for own in layout.shapes(1, 1, 1)}
        if None not in fused.values():  # else files hold them apart, or lack some
            named |= _apart(name, fused, layout)  # type: ignore[arg-type]
    return named


def _own_name(model: PreTrainedModel, name: str, known: dict[str, Tensor]) -> str:
    """Name in `model` of what transformers calls `name`, experts being split; `known` are all that there are."""
    own = module_name(model, name)
    with_prefix = f"{model.base_model_prefix}.{own}"
    return with_prefix if own not in known and with_prefix in known else own


def _check_usable(tensor: Tensor, expected: Tensor, converted: bool, what: str) -> None:
    """Refuse a tensor that is not the one of the model."""
    if converted or tensor.shape != expected.shape or tensor.is_floating_point() != expected.is_floating_point():
        wanted = "transformers converts it" if converted else f"the model wants {list(expected.shape)}"
        raise LlmqatError(
            f"{what} as {tensor.dtype} {list(tensor.shape)}, and {wanted}: it cannot be used where it lies; "
            f"{LOW_MEMORY}"
        )


def _apart(name: str, fused: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Views of the fused Parameters of the experts `name`, by the names that the experts have once they are split."""
    parts: dict[str, Tensor] = {}
    for expert in range(len(fused["down_proj"])):
        for projection, (weight, bias) in layout.apart(fused, expert).items():
            parts[f"{name}.{expert}.{projection}.weight"] = weight
            if bias is not None:
                parts[f"{name}.{expert}.{projection}.bias"] = bias
    return parts


def _put(model: PreTrainedModel, key: str, tensor: Tensor, disk: Disk) -> None:
    """Give `model` the tensor `key`: what trains is a vector, and is copied."""
    owner, _, name = key.rpartition(".")
    module = model.get_submodule(owner)
    if tensor.ndim < 2:
        tensor = tensor.clone()
    elif isinstance(module, LINEAR_LAYERS) and is_transposed(module):
        tensor = disk.put(tensor.T).T
    elif not tensor.is_contiguous():
        tensor = disk.put(tensor)
    if isinstance(getattr(module, name), nn.Parameter):
        setattr(module, name, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, name, tensor.to(torch.get_default_dtype()) if tensor.is_floating_point() else tensor)
