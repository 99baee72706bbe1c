"""Write an exported model as a directory for transformers: safetensors, configs, the files of the tokenizer."""

import copy
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.formats.compressed_tensors import OWN_KEY
from llmqat.formats.directory import TEXT_FILES, model_files
from llmqat.formats.export.source import Source
from llmqat.formats.weights import WEIGHTS
from llmqat.formats.writer import save_shard, write_index
from llmqat.nn.packed_linear import PackedLinear
from llmqat.progress import track

SHARD_BYTES = 5 * 10**9


def write_directory(
    source: Source,
    scratch: Path,
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
    entries: dict[str, Any] | None = None,
) -> None:
    """Write an exported model to `scratch`.

    Args:
        source: the packed model it is made of.
        scratch: an empty directory.
        tensors: of the new model, made one after the other.
        dtype: that config.json names: of the float parts.
        entries: what config.json says of the format, by its keys there.
    """
    write_shards(tensors, scratch)
    config = copy.deepcopy(source.model.config)
    config.__dict__.pop(OWN_KEY, None)
    config.dtype = dtype
    for key, value in (entries or {}).items():
        setattr(config, key, value)
    config.save_pretrained(scratch)
    if source.model.can_generate():
        source.model.generation_config.save_pretrained(scratch)
    copy_text_files(source.directory, scratch)


def moved(source: Source, make: Callable[[PackedLinear], dict[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of an exported model by its name in files: float parts as they are, layers as `make` makes them."""
    yield from source.float_parts()
    for path, layer in track(source.layers.items(), "export", len(source.layers)):
        bias = {} if layer.bias is None else {"bias": layer.bias}
        for part, tensor in (make(layer) | bias).items():
            yield f"{source.file_name(path)}.{part}", tensor


def copy_text_files(directory: Path, scratch: Path) -> None:
    """Copy what turns text into tokens: vocabulary, special tokens, chat templates."""
    for name in sorted(model_files(directory, TEXT_FILES)):
        (scratch / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(directory / name, scratch / name)


def write_shards(tensors: Iterable[tuple[str, Tensor]], scratch: Path) -> None:
    """Write tensors into safetensors files of at most `SHARD_BYTES`; one file's tensors are in memory at a time."""
    homes: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    filled = total = 0

    def close() -> None:
        save_shard(shard, scratch / f"{len(homes)}.safetensors")
        homes.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and filled + tensor.nbytes > SHARD_BYTES:
            close()
            filled = 0
        shard[name] = tensor.contiguous()
        filled, total = filled + tensor.nbytes, total + tensor.nbytes
    close()
    if len(homes) == 1:
        (scratch / "0.safetensors").rename(scratch / WEIGHTS)
        return
    weight_map = {}
    for index, names in enumerate(homes):
        filename = f"model-{index + 1:05}-of-{len(homes):05}.safetensors"
        (scratch / f"{index}.safetensors").rename(scratch / filename)
        weight_map.update(dict.fromkeys(names, filename))
    write_index(scratch, {"total_size": total}, weight_map)
