"""Load a packed directory onto `PackedLinear`, without ever making a dense weight."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from llmqat.errors import LlmqatError, error_text
from llmqat.formats.compressed_tensors import KV_BITS_KEY, METHOD, OWN_KEY
from llmqat.formats.conv1d import from_conv1d_layout
from llmqat.formats.skeleton import own_name, skeleton
from llmqat.formats.weights import AGAIN, read_mapped, read_tensors, tensor_headers
from llmqat.models.experts import module_name
from llmqat.models.foreign import ForeignError, from_pretrained, local_directory
from llmqat.nn.kv_cache import quantize_kv
from llmqat.nn.packed_linear import PackedLinear, packed_layers
from llmqat.serve.attach import attach


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
    except (ValueError, RecursionError) as error:
        raise LlmqatError(f"{path} is damaged ({error_text(error)}); write the model again") from error
    if not isinstance(config, dict):
        raise LlmqatError(f"{path} is damaged (no mapping); write the model again")
    return config


def is_packed(directory: Path) -> bool:
    """Whether a directory holds a model packed by compressed-tensors."""
    return bool(quantization_of(directory).get("quant_method") == METHOD)


def quantization_of(directory: Path) -> dict[str, Any]:
    """The `quantization_config` of config.json; empty if there is none.

    Raises:
        LlmqatError: see `read_config`; or if it is no mapping.
    """
    quantization: Any = read_config(directory).get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise LlmqatError(f"{directory / 'config.json'}: quantization_config is no mapping; {AGAIN}")
    return quantization


def load_packed(
    name: str | Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    activations: Literal["int8"] | None = None,
    native: bool = True,
    mapped: bool = False,
) -> PreTrainedModel:
    """A packed model, ready to run.

    Args:
        name: directory or Hub repository.
        dtype: of the float parts and the activations; by default the stored one. Scales keep the dtype of the file.
        device: where to put it.
        activations: "int8" quantizes those of a model that was trained without, for speed: no longer what was trained.
        native: False leaves blocks and sampling to the code of transformers; see `llmqat.serve`.
        mapped: leave codes and scales in the files, for a model larger than memory; slower, and they have to stay.

    Returns:
        the transformers model of the config's architecture in evaluation mode, its layers `PackedLinear`.

    Raises:
        LlmqatError: if the directory is incomplete or damaged, or of a format llmqat does not run.
    """
    directory = local_directory(name)
    model = skeleton(directory, quantization_of(directory), tensor_headers(directory), dtype)
    _fill(model, directory, read_mapped(directory) if mapped else read_tensors(directory))
    if (directory / "generation_config.json").exists():
        model.generation_config = generation_config(directory)
    kv_bits = kv_bits_in(directory)
    if kv_bits is not None:
        quantize_kv(model, kv_bits)
    model.to(device)  # type: ignore[arg-type]
    model.eval()
    return attach(model, activations, native)


def _fill(model: PreTrainedModel, directory: Path, tensors_of_file: Iterable[tuple[str, Tensor]]) -> None:
    """Assign the tensors of the file, whose headers were checked, float parts in the dtype of `model`.

    Raises:
        LlmqatError: if a scale is not finite, or a layer says another shape than its codes have.
    """
    layers = packed_layers(model)
    paths = {id(module): name for name, module in model.named_modules()}
    looked_up, head = paths[id(model.get_input_embeddings())], paths.get(id(model.get_output_embeddings()), "")
    state: dict[str, Tensor] = {}
    for name, tensor in tensors_of_file:
        key = module_name(model, name)
        key = own_name(key, looked_up, head) if looked_up not in layers and head in layers else key
        float_part = tensor.is_floating_point() and key.rpartition(".")[0] not in layers
        state[key] = tensor.to(model.dtype) if float_part else tensor
    for name, layer in layers.items():
        own = {key.removeprefix(f"{name}."): key for key in state if key.startswith(f"{name}.")}
        tensors = {part: state[key] for part, key in own.items()}
        if layer.stored_transposed:
            tensors = from_conv1d_layout(tensors, layer.scheme.bits, layer.out_features)
        _check_values(name, layer, tensors, directory)
        state.update({f"{name}.{part}": tensor for part, tensor in tensors.items()})
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def _check_values(name: str, layer: PackedLinear, tensors: dict[str, Tensor], directory: Path) -> None:
    """Check values, which headers do not tell: scales are numbers, the stored shape is that of the layer."""
    if tensors["weight_shape"].tolist() != [layer.out_features, layer.in_features]:
        raise LlmqatError(
            f"{directory}: {name}.weight_shape is {tensors['weight_shape'].tolist()}, and the layer is "
            f"{[layer.out_features, layer.in_features]}; {AGAIN}"
        )
    for part in ("weight_scale", "input_scale", "bias"):
        if part in tensors and not tensors[part].isfinite().all():
            raise LlmqatError(f"{directory}: {name}.{part} holds numbers that are not finite; {AGAIN}")


def kv_bits_in(directory: Path) -> int | None:
    """Bits of the cache that config.json asks for; None for a float one.

    Raises:
        LlmqatError: if it is no number.
    """
    own = read_config(directory).get(OWN_KEY) or {}
    bits = own.get(KV_BITS_KEY) if isinstance(own, dict) else own
    if bits is not None and type(bits) is not int:
        raise LlmqatError(f"{directory / 'config.json'}: {OWN_KEY} says {own!r}, and not {{'kv_bits': 8}}; {AGAIN}")
    return bits


def generation_config(directory: Path) -> Any:
    """The values of generation_config.json.

    Raises:
        LlmqatError: if it is damaged.
    """
    try:
        return from_pretrained(GenerationConfig, directory)
    except ForeignError as error:
        raise LlmqatError(
            f"cannot use {directory / 'generation_config.json'}: {error}; copy it again, or remove it"
        ) from error
