"""Float models from checkpoints in MXFP4 (gpt-oss) or FP8 (DeepSeek, Qwen), dequantized once into a directory of
safetensors, as which everything else knows them.

Such numbers lie on no grid of ours: what they stand for is the float model that a run starts from. A tensor at a time
is read, and a part of the model is in memory, whatever its size.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.files import appearing
from llmqat.models.gguf_file import DAMAGED, DEQUANTIZED, cache
from llmqat.models.stored import float_weight_files, headers
from llmqat.progress import log

# quant_method in config.json -> its name.
FORMATS = {"mxfp4": "MXFP4", "fp8": "FP8"}
IMPORTED = ("gptq", "awq")
VERSION = 1  # of what is made of a directory: raise it with each change to it
SHARD_BYTES = 4 << 30
# What belongs to a model beside its weights.
BESIDE = (".json", ".jinja", ".model", ".txt")
# E2M1, two to a byte, the low half first; an exponent of two for 32 of them. OCP Microscaling Formats 1.0, 5.3 and 6.3.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
EXPONENT_BIAS = 127
# What stands beside a quantized tensor, or in its place, by the end of its name.
BLOCKS, SCALES, SCALE = "_blocks", "_scales", "_scale_inv"
OF_ACTIVATIONS = (".activation_scale", ".input_scale")


def check_format(quantization: Any, name: str) -> None:
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
        LlmqatError: if the checkpoint is damaged, or holds tensors in another way than its config says; if the
            directory cannot be written.
    """
    files = [directory / "config.json", *float_weight_files(directory)]
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = f"{VERSION} {directory.resolve()} {states}"
    made = cache() / f"{directory.name}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not made.is_dir():
        log(f"reading {directory} in {format_of(directory)}, once: it stays dequantized in {made}")
        with appearing(made, "set XDG_CACHE_HOME to another place") as scratch:
            _write_model(directory, scratch)
    return made


def _write_model(directory: Path, scratch: Path) -> None:
    """Write the float model of `directory` to `scratch`, with all that lies beside its weights."""
    for path in directory.iterdir():
        if path.suffix in BESIDE and not path.name.endswith(".index.json"):
            shutil.copyfile(path, scratch / path.name)
    config = json.loads((directory / "config.json").read_text("utf-8"))
    quantization = config.pop("quantization_config")
    (scratch / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shard, places = dict[str, Tensor](), dict[str, str]()

    def write() -> None:
        file = f"model-{len(set(places.values())) + 1:05}.safetensors"
        save_file(shard, scratch / file, {"format": "pt"})
        places.update(dict.fromkeys(shard, file))
        shard.clear()

    for name, tensor in _float_tensors(directory, quantization):
        shard[name] = tensor
        if sum(own.nbytes for own in shard.values()) > SHARD_BYTES:
            write()
    if shard:
        write()
    index = {"metadata": {}, "weight_map": places}
    (scratch / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _float_tensors(directory: Path, quantization: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each tensor of the float model of `directory`."""
    files = {name: path for path in float_weight_files(directory) for name in headers(path)}
    block = quantization.get("weight_block_size")

    def read(name: str) -> Tensor:
        if name not in files:
            raise LlmqatError(f"{directory} lacks {name}; {DAMAGED}, or start from the float model it was made of")
        with safe_open(files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    for name in files:
        stem = name.removesuffix(BLOCKS)
        if stem != name:
            yield stem, from_mxfp4(read(name), read(stem + SCALES))
        elif name + SCALE in files:
            yield name, from_fp8(read(name), read(name + SCALE), block, name)
        elif name.removesuffix(SCALES) + BLOCKS not in files and not name.endswith((SCALE, *OF_ACTIVATIONS)):
            tensor = read(name)
            yield name, from_fp8(tensor, read(name + SCALE), block, name) if _is_fp8(tensor) else tensor


def from_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The experts of a projection ``(experts, in, out)``, as gpt-oss has them.

    Args:
        blocks: bytes of two codes ``(experts, out, groups, 16)``.
        scales: exponents ``(experts, out, groups)``.
    """
    values = torch.tensor(E2M1)

    def expert(codes: Tensor, exponents: Tensor) -> Tensor:
        pairs = torch.stack([codes & 15, codes >> 4], -1).flatten(-2).int()
        factors = torch.exp2(exponents.float() - EXPONENT_BIAS)
        return (values[pairs] * factors.unsqueeze(-1)).flatten(-2).to(DEQUANTIZED).T

    return torch.stack(list(map(expert, blocks, scales)))


def from_fp8(weight: Tensor, scale: Tensor, block: list[int] | None, name: str) -> Tensor:
    """A weight ``(..., out, in)`` in eight bits times its scales.

    Args:
        weight: float8.
        scale: a number for each block, those at the ends being cut off by the weight's; integers are exponents of two.
        block: rows and columns of one; None for one scale.
        name: of the weight, for messages.

    Raises:
        LlmqatError: if the scales are not as many as the blocks, or the weight has not eight bits.
    """
    rows, columns = weight.shape[-2:]
    high, wide = block or (rows, columns)
    grid = (*weight.shape[:-2], -(-rows // high), -(-columns // wide))
    if not _is_fp8(weight) or (scale.shape != grid if block else scale.numel() != 1):
        raise LlmqatError(
            f"{name} is {weight.dtype} {list(weight.shape)} with scales {list(scale.shape)}, not FP8 with one for "
            f"{f'each {high} x {wide}' if block else 'all'}; start from the float model it was made of"
        )
    factors = scale.float() if scale.is_floating_point() else torch.exp2(scale.float() - EXPONENT_BIAS)
    if block:
        factors = factors.repeat_interleave(high, -2)[..., :rows, :].repeat_interleave(wide, -1)[..., :columns]
    return (weight.float() * factors).to(DEQUANTIZED)


def _is_fp8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.element_size() == 1
