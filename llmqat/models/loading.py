"""Load float models: from the Hub, from a directory, or the Llama inside this package."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from llmqat.errors import LlmqatError

# Names that need no network.
ALIASES = {"llama": "llama"}


def resolve_name(name: str) -> str:
    """The directory of a bundled model, or `name` as it is."""
    if name in ALIASES and not Path(name).exists():
        return str(files("llmqat") / "models" / "bundled" / ALIASES[name])
    return name


def load_config(name: str) -> Any:
    """The config of a float model.

    Raises:
        LlmqatError: if it cannot be found or read, its family is unknown to transformers, or it is quantized already.
    """
    path = resolve_name(name)
    if path.startswith((".", "/")) and not Path(path).is_dir():
        raise LlmqatError(f"model directory {name} does not exist; give a directory, a Hub id, or {', '.join(ALIASES)}")
    try:
        config = AutoConfig.from_pretrained(path)
    except ValueError as error:
        raise LlmqatError(f"cannot use model {name}: {_short(error)}") from error
    except OSError as error:
        raise LlmqatError(
            f"cannot load model {name}: not a model directory, and not reachable on the Hub; without a network, give a "
            f"local directory or {', '.join(ALIASES)}"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise LlmqatError(f"model {name} is quantized already; start from the float model it was made of")
    return config


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model.

    Args:
        name: Hub id, directory or alias.

    Returns:
        what `AutoTokenizer` gives.

    Raises:
        LlmqatError: if it has none.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_name(name))
    except (OSError, ValueError) as error:
        raise LlmqatError(f"model {name} has no tokenizer that transformers can load: {_short(error)}") from error


def load_float(name: str, dtype: torch.dtype | None = None) -> tuple[PreTrainedModel, torch.dtype]:
    """A float model in evaluation mode.

    Args:
        name: Hub id, directory or alias.
        dtype: to compute in; by default the stored one.

    Returns:
        the model, and the dtype its weights are stored in.

    Raises:
        LlmqatError: see `load_config`; or if its weights are damaged.
    """
    stored = getattr(load_config(name), "dtype", None) or torch.float32
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve_name(name), dtype=dtype or stored, output_loading_info=True
        )
    except (
        Exception
    ) as error:  # safetensors, OS and torch errors: all mean that the files are not what config.json says
        raise LlmqatError(
            f"cannot load the weights of {name}: {_short(error)}; copy or download the model again"
        ) from error
    model, info = loaded
    if info["missing_keys"]:
        lost = ", ".join(sorted(info["missing_keys"])[:3])
        raise LlmqatError(f"cannot load the weights of {name}: they lack {lost}; copy or download the model again")
    return model.eval(), stored


def load_empty(name: str) -> tuple[PreTrainedModel, torch.dtype]:
    """A float32 model without weights, on the meta device, and the dtype that its weights are stored in.

    Raises:
        LlmqatError: see `load_config`.
    """
    config = load_config(name)
    stored = getattr(config, "dtype", None) or torch.float32
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.tie_weights()
    return model, stored


def _short(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
