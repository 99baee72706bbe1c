"""Float models from checkpoints in MXFP4 (gpt-oss), MXFP8 or FP8 (DeepSeek, Mistral, Qwen), dequantized once into a
directory of safetensors, as which everything else knows them.

Such numbers lie on no grid of ours: what they stand for is the float model that a run starts from. A tensor at a time
is read, and a part of the model is in memory, whatever its size.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.files import appearing
from llmqat.models.gguf_file import cache
from llmqat.models.quantized_files import OF_ACTIVATIONS, Codes, dequantize, quantized_tensors
from llmqat.models.stored import float_weight_files, headers_of
from llmqat.progress import log

# quant_method in config.json -> its name.
FORMATS = {"mxfp4": "MXFP4", "mxfp8": "MXFP8", "fp8": "FP8"}
IMPORTED = ("gptq", "awq")
VERSION = 1  # of what is made of a directory: raise it with each change to it
SHARD_BYTES = 4 << 30
# What belongs to a model beside its weights.
BESIDE = (".json", ".jinja", ".model", ".txt")


def check_format(quantization: Any, name: str | Path) -> None:
    """Refuse a checkpoint that is quantized in a way that is not dequantized here; `quantization` is what its config
    says.

    Raises:
        LlmqatError: with what to do about it.
    """
    method = method_of(quantization)
    if method in IMPORTED:
        raise LlmqatError(
            f"model {name} is quantized already ({method}); make a packed directory of its codes by llmqat import, or "
            "start from the float model it was made of"
        )
    if method not in FORMATS:
        raise LlmqatError(f"model {name} is quantized already; start from the float model it was made of")


def method_of(quantization: Any) -> Any:
    """`quant_method` of the quantization in a config, however it is held."""
    return quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method


def format_of(directory: Path) -> str:
    """Format of a directory's weights, one of `FORMATS`; empty if they are float, or nothing says so."""
    try:
        quantization = json.loads((directory / "config.json").read_text("utf-8")).get("quantization_config")
    except (OSError, ValueError, AttributeError):
        return ""  # transformers, which reads the config, says what is wrong
    return FORMATS.get(str(quantization.get("quant_method")), "") if isinstance(quantization, dict) else ""


def in_words(stored: str) -> str:
    """Say where the float model comes from that is stored in one of `FORMATS`."""
    return f"stored in {stored}: its dequantized weights, in bfloat16, are the float model"


def dequantized(directory: Path) -> Path:
    """The directory of the float model that a checkpoint stands for; made where it is missing, which takes a while.

    It lies beside those of GGUF files, under a name that changes with the files. Tensors that are not quantized are as
    they were, the others in bfloat16.

    Raises:
        LlmqatError: see `quantized_tensors`; or if the directory cannot be written.
    """
    files = [directory / "config.json", *float_weight_files(directory)]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = f"{VERSION} {directory.resolve()} {states}"
    made = cache() / f"{directory.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not made.is_dir():
        quantized = quantized_tensors(directory)  # refused before any is read
        log(f"reading {directory} in {format_of(directory)}, once: it stays dequantized in {made}")
        with appearing(made, "set XDG_CACHE_HOME to another place") as scratch:
            _write_model(directory, scratch, quantized)
    return made


def _write_model(directory: Path, scratch: Path, quantized: dict[str, Codes]) -> None:
    """Write the float model of `directory` to `scratch`, with all that lies beside its weights."""
    for path in directory.iterdir():
        if path.suffix in BESIDE and not path.name.endswith(".index.json"):
            shutil.copyfile(path, scratch / path.name)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    del config["quantization_config"]
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shard, places = dict[str, Tensor](), dict[str, str]()

    def write() -> None:
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, scratch / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in _float_tensors(directory, quantized):
        shard[name] = tensor
        if sum(own.nbytes for own in shard.values()) > SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {}, "weight_map": places}
    (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _float_tensors(directory: Path, quantized: dict[str, Codes]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the float model of `directory`."""
    files = {name: path for path, own in headers_of(directory) for name in own}
    scales = {codes.scales for codes in quantized.values()}

    def read(name: str) -> Tensor:
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    for name in files:
        if name in quantized:
            codes = quantized[name]
            together = codes.tensor != name  # MXFP4, whose experts lie transposed, a block of codes in a row
            tensor = dequantize(read(name).flatten(-2) if together else read(name), read(codes.scales), codes.block)
            yield codes.tensor, tensor.mT.contiguous() if together else tensor
        elif name not in scales and not name.endswith(OF_ACTIVATIONS):
            yield name, read(name)
