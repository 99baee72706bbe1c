"""Load a packed directory onto `PackedLinear`, without ever making a dense weight."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import KV_BITS_KEY, METHOD, OWN_KEY, schemes_of
from llmqat.formats.conv1d import turn_back
from llmqat.formats.writer import INDEX, WEIGHTS
from llmqat.models.experts import module_name, split_experts
from llmqat.models.foreign import ForeignError, from_pretrained
from llmqat.nn.embedding import PackedEmbedding, embed_scale_of
from llmqat.nn.kv_cache import quantize_kv
from llmqat.nn.linear_like import LINEAR_LAYERS, is_transposed, linear_shape
from llmqat.nn.packed_linear import PackedLinear
from llmqat.scheme import QuantScheme
from llmqat.serve.attach import attach

PACKED = ".weight_packed"


def local_directory(name: str | Path) -> Path:
    """A local model directory as it is, or a Hub repository downloaded.

    Raises:
        LlmqatError: if there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name)))
    except Exception as error:  # offline, missing and malformed names raise exceptions of several libraries
        raise LlmqatError(
            f"model {name} is neither a local directory nor a Hub repository that can be reached"
        ) from error


def read_config(directory: Path) -> dict[str, Any]:
    """config.json as it is.

    Raises:
        LlmqatError: if it is missing or damaged.
    """
    path = directory / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise LlmqatError(f"{directory} has no readable config.json; is it a model directory?") from error
    except json.JSONDecodeError as error:
        raise LlmqatError(f"{path} is damaged ({error.msg} in line {error.lineno}); write the model again") from error
    return config


def is_packed(directory: Path) -> bool:
    """Whether a directory holds a model packed by compressed-tensors."""
    return bool(_quantization(directory).get("quant_method") == METHOD)


def _quantization(directory: Path) -> dict[str, Any]:
    return read_config(directory).get("quantization_config") or {}


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, in order.

    Raises:
        LlmqatError: if there are none, or some are missing.
    """
    index = directory / INDEX
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else [WEIGHTS]
    except (ValueError, KeyError, TypeError) as error:
        raise LlmqatError(f"{index} is damaged; copy it again, or write the model again") from error
    for name in names:
        if not (directory / name).exists():
            raise LlmqatError(f"{directory} lacks {name}; copy the directory again, or write the model again")
    return [directory / name for name in names]


def read_tensors(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model, one at a time.

    Raises:
        LlmqatError: if a file is missing or truncated.
    """
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise LlmqatError(f"{path} is damaged ({error}); copy it again, or write the model again") from error


def load_packed(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    activations: Literal["int8"] | None = None,
    native: bool = True,
) -> PreTrainedModel:
    """A packed model, ready to run.

    Args:
        name: directory or Hub repository.
        dtype: of the float parts and the activations; by default the stored one. Scales keep the dtype of the file.
        device: where to put it.
        activations: "int8" quantizes those of a model that was trained without, for speed: no longer what was trained.
        native: False leaves blocks and sampling to the code of transformers; see `llmqat.serve`.

    Returns:
        the transformers model of the config's architecture in evaluation mode, its layers `PackedLinear`.

    Raises:
        LlmqatError: if the directory is incomplete or damaged, or of a format llmqat does not run.
    """
    directory = local_directory(name)
    quantization = _quantization(directory)
    config, model_class = _architecture(directory)
    stored: torch.dtype = config.dtype or torch.float32
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = model_class._from_config(config, dtype=dtype or stored)
        split_experts(model)
    tensors = {module_name(model, name): tensor for name, tensor in read_tensors(directory)}
    schemes = schemes_of(quantization, [key.removesuffix(PACKED) for key in tensors if key.endswith(PACKED)])
    tie_packed_head(model, tensors, schemes)
    modules = dict(model.named_modules())
    for layer, scheme in schemes.items():
        old = modules.get(layer)
        if not isinstance(old, LINEAR_LAYERS) or f"{layer}.weight_scale" not in tensors:
            linear = isinstance(old, LINEAR_LAYERS)
            what = f"lacks {layer}.weight_scale" if linear else f"packs {layer}, which is no linear layer"
            raise LlmqatError(f"{directory} {what}; its weights and config.json do not belong together")
        model.set_submodule(layer, _empty_packed(old, layer, scheme, tensors))
    _fill(model, tensors, set(schemes), dtype or stored, directory)
    if (directory / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    kv_bits = getattr(config, OWN_KEY, {}).get(KV_BITS_KEY)
    if kv_bits is not None:
        quantize_kv(model, kv_bits)
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return attach(model, activations, native)


def _architecture(directory: Path) -> tuple[Any, Any]:
    """The config without its quantization, and the class of transformers that it names.

    Raises:
        LlmqatError: if either is unknown to the installed transformers.
    """
    try:
        config = AutoConfig.from_pretrained(directory)
        model_class = getattr(transformers, config.architectures[0])
    except (OSError, ValueError, TypeError, AttributeError) as error:  # unknown model type, or none or no known class
        raise LlmqatError(
            f"cannot use {directory / 'config.json'}: {' '.join(str(error).split())}; its model_type or "
            "architectures are unknown to this transformers"
        ) from error
    config.__dict__.pop("quantization_config", None)
    return config, model_class


def tie_packed_head(model: PreTrainedModel, tensors: dict[str, Tensor], schemes: dict[str, QuantScheme]) -> None:
    """Where the file packs the embedding of a model with a tied head: give codes and scheme to the head, in place, and
    let the embedding look up its rows."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    name = names[id(embedding)]
    if name not in schemes or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    assert isinstance(embedding, nn.Embedding)
    schemes[names[id(head)]] = schemes.pop(name)
    for key in [key for key in tensors if key.startswith(f"{name}.")]:
        tensors[names[id(head)] + key.removeprefix(name)] = tensors.pop(key)
    scale = embed_scale_of(embedding)
    model.set_input_embeddings(PackedEmbedding(model.get_output_embeddings, model.dtype, embedding.padding_idx, scale))
    model._tied_weights_keys = {}  # no weight is left for `tie_weights`, which other libraries call, to tie


def _empty_packed(old: nn.Module, layer: str, scheme: QuantScheme, tensors: dict[str, Tensor]) -> PackedLinear:
    """A packed layer for the place of `old`, on meta; tensors that lie as ``(in, out)`` are turned in place."""
    out_features, in_features = linear_shape(old)
    if is_transposed(old):
        stored = {key.removeprefix(f"{layer}."): key for key in tensors if key.startswith(f"{layer}.")}
        turned = turn_back({own: tensors[key] for own, key in stored.items()}, scheme.bits, out_features)
        tensors.update({stored[own]: tensor for own, tensor in turned.items()})
        if scheme.group_size >= in_features:  # the longest row's length: one group per row
            scheme = replace(scheme, group_size=-1)
    storage_dtype = tensors[f"{layer}.weight_scale"].dtype
    return PackedLinear(in_features, out_features, scheme, storage_dtype, old.bias is not None, "meta")


def _fill(
    model: PreTrainedModel, tensors: dict[str, Tensor], packed: set[str], dtype: torch.dtype, directory: Path
) -> None:
    """Assign tensors by name, float parts in `dtype`, and tie what is tied."""
    state = {}
    for key, tensor in tensors.items():
        float_part = tensor.is_floating_point() and key.rsplit(".", 1)[0] not in packed
        state[key] = tensor.to(dtype) if float_part else tensor
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise LlmqatError(
            f"{directory}: tensors do not fit config.json: {str(error).splitlines()[-1].strip()}"
        ) from error
    model.tie_weights()
    lost = [key for key in missing if model.state_dict()[key].is_meta]
    if lost or unexpected:
        what = f"lacks {', '.join(lost[:3])}" if lost else f"holds unknown tensors {', '.join(unexpected[:3])}"
        raise LlmqatError(f"{directory} {what}; its weights and config.json do not belong together")


def generation_config(directory: Path) -> Any:
    """What generation_config.json says.

    Raises:
        LlmqatError: if it is damaged.
    """
    try:
        return from_pretrained(GenerationConfig, directory)
    except ForeignError as error:
        raise LlmqatError(
            f"cannot use {directory / 'generation_config.json'}: {error}; copy it again, or remove it"
        ) from error
