"""The model that a packed directory describes, without weights: config.json and the headers of its tensors brought
together, and every disagreement between them named before a tensor is read or native code sees one."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from llmqat.compat.transformers import forget_ties, model_from_config
from llmqat.errors import LlmqatError, error_text
from llmqat.formats.compressed_tensors import schemes_of
from llmqat.formats.conv1d import stored_layout
from llmqat.models.experts import module_name, split_experts
from llmqat.models.foreign import ForeignError, from_pretrained
from llmqat.models.stored import FLOATS, Header
from llmqat.models.ties import possible_ties, set_tied, shared_ties
from llmqat.nn.embedding import PackedEmbedding, embed_scale_of
from llmqat.nn.linear_like import LINEAR_LAYERS, is_transposed, linear_shape
from llmqat.nn.packed_linear import PackedLinear, packed_layers
from llmqat.scheme import QuantScheme

PACKED, SCALE = ".weight_packed", ".weight_scale"
MOST_BUFFER_BYTES, MOST_POSITIONS = 1 << 28, 1 << 24
APART = "its weights and config.json do not belong together"
INTEGERS = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32", torch.int64: "I64"}
NAME_OF = {**{dtype: name for name, dtype in FLOATS.items()}, **INTEGERS, torch.bool: "BOOL"}


def skeleton(
    directory: Path, quantization: Mapping[str, Any], found: Mapping[str, Header], dtype: torch.dtype | None
) -> PreTrainedModel:
    """The model of a packed directory on the meta device, its layers `PackedLinear`, with what fits the file alone.

    Args:
        directory: whose config.json it is.
        quantization: the `quantization_config` in there.
        found: the tensors of the file by name.
        dtype: of float parts; None for that of the config.

    Raises:
        LlmqatError: if config and tensors do not belong together, or are not what llmqat runs.
    """
    config, model_class = _architecture(directory)
    _check_sizes(config, found, directory)
    dtype = dtype or config.dtype or torch.float32
    _check_buffers(model_class, config, dtype, directory)
    model = _empty(model_class, config, dtype, directory)
    names = {module_name(model, name): header for name, header in found.items()}
    if any(_stored(names, name) and _stored(names, source) for name, source in possible_ties(model).items()):
        set_tied(config, False)  # a head of its own beside a flag that says otherwise
        model = _empty(model_class, config, dtype, directory)
    schemes = schemes_of(quantization, [key.removesuffix(PACKED) for key in names if key.endswith(PACKED)])
    names, schemes = tie_packed_head(model, names, schemes)
    modules = dict(model.named_modules())
    for layer, scheme in schemes.items():
        old = modules.get(layer)
        if not isinstance(old, LINEAR_LAYERS) or f"{layer}{SCALE}" not in names:
            linear = isinstance(old, LINEAR_LAYERS)
            what = f"lacks {layer}{SCALE}" if linear else f"packs {layer}, which is no linear layer"
            raise LlmqatError(f"{directory} {what}; {APART}")
        model.set_submodule(layer, _empty_packed(old, scheme, _scale_dtype(names[f"{layer}{SCALE}"], layer, directory)))
    check_headers(model, names, directory)
    return model


def _architecture(directory: Path) -> tuple[Any, Any]:
    """The config without its quantization, and the class of transformers that it names."""
    try:
        config = from_pretrained(AutoConfig, directory)
        model_class = getattr(transformers, config.architectures[0])
        if not issubclass(model_class, PreTrainedModel):
            raise TypeError(f"{config.architectures[0]} is no model")
    except (ForeignError, TypeError, AttributeError, LookupError) as error:
        raise LlmqatError(
            f"cannot use {directory / 'config.json'}: {error_text(error)}; its model_type or architectures are unknown "
            "to this transformers, or it is damaged: write the model again"
        ) from error
    config.__dict__.pop("quantization_config", None)
    return config, model_class


def _check_sizes(config: Any, found: Mapping[str, Header], directory: Path) -> None:
    """A config is a few bytes, and can ask for more memory and layers than there are: no model has more layers than
    tensors, is wider than the widest of them, or sees more positions than `MOST_POSITIONS`."""
    text = config.get_text_config()
    widest = max((size for header in found.values() for size in header.shape), default=0)
    limits = {"num_hidden_layers": len(found), "num_local_experts": len(found), "num_experts": len(found)}
    for key, limit in {**limits, "hidden_size": widest, "head_dim": widest}.items():
        value = _size(text, key)
        if value is not None and value > limit:
            lost = f"layers.{limit}" if key == "num_hidden_layers" else f"all but {limit} of them"
            raise LlmqatError(f"{directory / 'config.json'}: {key} is {value}, but the file lacks {lost}; {APART}")
    for key in ("max_position_embeddings", "max_seq_len"):
        value = _size(text, key)
        if value is not None and value > MOST_POSITIONS:
            raise LlmqatError(
                f"{directory / 'config.json'}: {key} is {value}, and no model sees more than {MOST_POSITIONS} "
                "positions; write the model again"
            )


def _size(config: Any, key: str) -> int | None:
    """A number of `config`; None if it has none of that name, or one for each layer."""
    try:
        value = getattr(config, key, None)
    except Exception:  # Gemma 4's heads differ by layer, and reading a size that they share is an error
        return None
    return value if isinstance(value, int) else None


def _check_buffers(model_class: Any, config: Any, dtype: torch.dtype, directory: Path) -> None:
    """Buffers are in no file, and a config may ask for any number of positions: masks grow with its square."""
    with _building(directory), torch.device("meta"):
        model = model_from_config(model_class, config, dtype)
    size = sum(buffer.nbytes for buffer in model.buffers())
    if size > MOST_BUFFER_BYTES:
        raise LlmqatError(
            f"{directory / 'config.json'} asks for {size >> 20} MB of masks and tables beside the weights, and llmqat "
            f"makes at most {MOST_BUFFER_BYTES >> 20} MB; lower its number of positions, or write the model again"
        )


@contextmanager
def _building(directory: Path) -> Iterator[None]:
    """Whatever the code of a family does with values of config.json that it does not expect becomes one error."""
    try:
        yield
    except Exception as error:
        raise LlmqatError(
            f"cannot build the model that {directory / 'config.json'} describes: {error_text(error)}; write the model "
            "again"
        ) from error


def _empty(model_class: Any, config: Any, dtype: torch.dtype, directory: Path) -> PreTrainedModel:
    """A model of the config on the meta device, its experts apart; its buffers have their values."""
    with _building(directory):
        with init_empty_weights(include_buffers=False):
            model = model_from_config(model_class, config, dtype)
        split_experts(model)
        model.tie_weights()
    return model


def _stored(names: Mapping[str, Header], parameter: str) -> bool:
    """Whether the file has a parameter, packed or not."""
    return parameter in names or f"{parameter}_packed" in names


def tie_packed_head(
    model: PreTrainedModel, names: dict[str, Header], schemes: dict[str, QuantScheme]
) -> tuple[dict[str, Header], dict[str, QuantScheme]]:
    """Where the file packs the embedding, and has no head: the names of its codes and scheme for the head, whose rows
    the embedding of `model` then looks up."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths = {id(module): name for name, module in model.named_modules()}
    name, target = paths.get(id(embedding)), paths.get(id(head))
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if name not in schemes or target is None or not tied or _stored(names, f"{target}.weight"):
        return names, schemes
    assert isinstance(embedding, nn.Embedding)
    assert name is not None
    scale = embed_scale_of(embedding)
    model.set_input_embeddings(PackedEmbedding(model.get_output_embeddings, model.dtype, embedding.padding_idx, scale))
    forget_ties(model)  # the embedding has no weight of its own any more
    renamed = {own_name(key, name, target): header for key, header in names.items()}
    return renamed, {target if layer == name else layer: scheme for layer, scheme in schemes.items()}


def own_name(key: str, embedding: str, head: str) -> str:
    """The name of a packed embedding's tensor in the head that holds its codes; any other as it is."""
    part = key.removeprefix(f"{embedding}.")
    packed = part != key and (part.startswith("weight_") or part in ("input_scale", "bias"))
    return f"{head}.{part}" if packed else key


def _scale_dtype(header: Header, layer: str, directory: Path) -> torch.dtype:
    if header.dtype not in FLOATS:
        raise LlmqatError(
            f"{directory}: tensors do not fit config.json: {layer}{SCALE} is {header.dtype}, and has to be one of "
            f"{', '.join(FLOATS)}"
        )
    return FLOATS[header.dtype]


def _empty_packed(old: nn.Module, scheme: QuantScheme, scale_dtype: torch.dtype) -> PackedLinear:
    """A packed layer for the place of `old`, on the meta device."""
    out_features, in_features = linear_shape(old)
    if is_transposed(old) and scheme.group_size >= in_features:  # the longest row's length: one group per row
        scheme = replace(scheme, group_size=-1)
    packed = PackedLinear(in_features, out_features, scheme, scale_dtype, old.bias is not None, "meta")
    packed.stored_transposed = is_transposed(old)
    return packed


def expected_headers(model: PreTrainedModel) -> dict[str, Header]:
    """Dtype and shape of every tensor of `model` as a file holds them."""
    expected = {}
    layers = packed_layers(model)
    for key, tensor in model.state_dict().items():
        layer, _, part = key.rpartition(".")
        if layer in layers and layers[layer].stored_transposed:
            own = layers[layer]
            tensor = stored_layout(part, tensor, (own.out_features, own.in_features), own.scheme.bits)
        expected[key] = Header(NAME_OF.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape))
    return expected


def check_headers(model: PreTrainedModel, names: Mapping[str, Header], directory: Path) -> None:
    """Every tensor of the file has its place in `model`, its shape, and a dtype that fits; and none is missing.

    Raises:
        LlmqatError: naming the first that does not.
    """
    expected, tied = expected_headers(model), shared_ties(model)
    lost = [key for key in expected if key not in names and key not in tied]
    unknown = [key for key in names if key not in expected]
    if lost or unknown:
        what = f"lacks {', '.join(lost[:3])}" if lost else f"holds unknown tensors {', '.join(unknown[:3])}"
        raise LlmqatError(f"{directory} {what}; {APART}")
    for key, header in names.items():
        dtype, shape = expected[key]
        problem = ""
        if header.shape != shape:
            problem = f"size mismatch for {key}: {list(header.shape)} in the file, {list(shape)} by config.json"
        elif header.dtype != dtype and not (dtype in FLOATS and header.dtype in FLOATS):
            problem = f"{key} is {header.dtype} in the file, and has to be {dtype}"
        if problem:
            raise LlmqatError(f"{directory}: tensors do not fit config.json: {problem}; {APART}")
