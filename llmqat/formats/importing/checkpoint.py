"""Find what a checkpoint of another tool holds: its layers on their grids, and everything beside them."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from llmqat.errors import LlmqatError
from llmqat.formats.compressed_tensors import METHOD
from llmqat.formats.importing.awq import awq_layer, awq_zero_points, check_awq
from llmqat.formats.importing.directory import Checkpoint
from llmqat.formats.importing.gguf import INTEGERS, gguf_layers
from llmqat.formats.importing.gptq import check_gptq, gptq_layer, gptq_zero_points
from llmqat.formats.reader import quantization_of, read_config
from llmqat.formats.weights import read_mapped
from llmqat.models.foreign import ForeignError, from_pretrained, local_directory
from llmqat.models.gguf_file import EXTENSION, directory_of
from llmqat.models.loading import empty_model, load_empty, load_tokenizer
from llmqat.scheme import BITS

READERS = {"gptq": (check_gptq, gptq_zero_points, gptq_layer), "awq": (check_awq, awq_zero_points, awq_layer)}
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def checkpoint_of(name: str | Path) -> Checkpoint:
    """The checkpoint in a directory, a Hub repository or a GGUF file.

    Raises:
        LlmqatError: if it is of no format that llmqat imports, damaged, on a grid that llmqat does not have, or without
            the tokenizer of the model.
    """
    if Path(name).suffix == EXTENSION:  # which holds the tokenizer, a token for each row of the embedding
        return _of_gguf(Path(name))
    found = _of_directory(name)
    _check_tokenizer(found)
    return found


def _check_tokenizer(found: Checkpoint) -> None:
    """Refuse ids that the embedding has no row for: a text that holds one could not be run."""
    try:
        tokenizer = load_tokenizer(str(found.directory))
    except LlmqatError as error:
        raise LlmqatError(
            f"{found.directory} has no tokenizer that transformers can load; copy the files of the model's own there"
        ) from error
    rows = found.model.get_input_embeddings().get_parameter("weight").shape[0]
    last = max(tokenizer.get_vocab().values())
    if last >= rows:
        raise LlmqatError(
            f"the tokenizer in {found.directory} has tokens up to {last}, and the model an embedding of {rows}: it is "
            "that of another model; copy the files of the model's own there"
        )


def _of_directory(name: str | Path) -> Checkpoint:
    """A checkpoint of GPTQ or AWQ in a directory or a Hub repository."""
    directory = local_directory(name)
    config = quantization_of(directory)
    method = config.get("quant_method")
    if method == METHOD:
        raise LlmqatError(f"{name} is {METHOD}, which llmqat loads, runs and exports as it is")
    if method not in READERS:
        what = f"is quantized by {method}" if method else "is a float model, which needs no import"
        raise LlmqatError(f"{name} {what}; llmqat imports {', '.join(READERS)} and GGUF files")
    return _quantized(directory, config)


def _quantized(directory: Path, config: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint of GPTQ or AWQ; all its layers are symmetric, or all have zero points."""
    for key, known in (("bits", BITS), ("group_size", None)):
        if type(config.get(key)) is not int or (known and config[key] not in known):
            raise LlmqatError(f"{directory / 'config.json'}: {key} is {config.get(key)!r}; llmqat has {BITS} bits")
    check, zero_points, read = READERS[config["quant_method"]]
    check(config)
    tensors = dict(read_mapped(directory))
    names = [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]
    if not names:
        raise LlmqatError(f"{directory} holds no quantized layer; copy or download the checkpoint again")
    zeros = {name: zero_points(tensors, name, config) for name in names}
    symmetric = all(bool((zero == 1 << config["bits"] - 1).all()) for zero in zeros.values())
    parts = {f"{name}.{part}" for name in names for part in PARTS}
    try:
        model_config = from_pretrained(AutoConfig, directory)
    except ForeignError as error:
        kind = read_config(directory).get("model_type")
        raise LlmqatError(
            f"{directory / 'config.json'}: this transformers has no model type {kind!r}, or cannot read the rest; "
            "install a newer one, or copy the checkpoint again"
        ) from error
    model_config.__dict__.pop("quantization_config", None)
    declared, model = model_config.dtype, empty_model(model_config)
    model.config.dtype = declared  # which making it has replaced
    return Checkpoint(
        directory,
        model,
        {name: partial(read, tensors, name, config, None if symmetric else zeros[name]) for name in names},
        ((name, tensor) for name, tensor in tensors.items() if name not in parts),
    )


def _of_gguf(path: Path) -> Checkpoint:
    """A GGUF file; what is on no grid of ours is float, as `directory_of` makes it."""
    directory = directory_of(path)
    model, stored = load_empty(str(directory))
    model.config.dtype = stored
    layers = gguf_layers(path, model)
    if not layers:
        raise LlmqatError(
            f"{path} has no layer in blocks of {', '.join(INTEGERS)}; use it by --model, as a float model"
        )
    weights = {f"{name}.weight" for name in layers}
    return Checkpoint(directory, model, layers, ((n, t) for n, t in read_mapped(directory) if n not in weights))
