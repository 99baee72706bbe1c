"""`gguf`: one file for llama.cpp and all that read its format: weights in blocks, config, tokenizer, chat template."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf_blocks import BLOCK, BlockType, block_type, to_blocks
from llmqat.formats.export.gguf_families import (
    GgufFamily,
    add_metadata,
    family_of,
    rotary_divisors,
    swap_halves,
)
from llmqat.formats.export.gguf_vocabulary import add_vocabulary
from llmqat.formats.export.source import Source
from llmqat.models.gguf_file import gguf_package
from llmqat.nn.packed_linear import PackedLinear
from llmqat.progress import track

FILE = "model.gguf"
TYPE_OF = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


class Entry(NamedTuple):
    """A tensor of the file before it is made.

    Attributes:
        name: in GGUF.
        kind: its type there.
        shape: ``(rows, bytes of a row)``, or ``(bytes,)``.
        make: makes its bytes, uint8.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]


def write_gguf(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` as one GGUF file."""
    gguf, config = gguf_package(), source.model.config
    family = family_of(config)
    writer = gguf.GGUFWriter(scratch / FILE, family.architecture)
    try:
        writer.add_type("model")
        writer.add_name(source.directory.resolve().name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_metadata(writer, config, family)
        add_vocabulary(writer, source.directory, config.vocab_size)
        found = list(entries(source, family, names_of(gguf, source, family)))
        writer.add_file_type(file_type(gguf, found))
        for entry in found:
            kind = gguf.GGMLQuantizationType[entry.kind]
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.uint8), int(np.prod(entry.shape)), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in track(found, "export", len(found)):
            writer.write_tensor_data(entry.make().numpy())
    finally:
        writer.close()


def names_of(gguf: Any, source: Source, family: GgufFamily) -> Callable[[str], str]:
    """Names of tensors in files -> in GGUF."""
    architecture = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    known = gguf.get_tensor_name_map(architecture, source.model.config.num_hidden_layers)

    def name_of(name: str) -> str:
        found: str | None = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise LlmqatError(f"llama.cpp has no tensor like {name} in a {family.architecture}; export to dense")
        return found

    return name_of


def entries(source: Source, family: GgufFamily, name_of: Callable[[str], str]) -> Iterator[Entry]:
    """Every tensor of the file."""
    heads = rotated_heads(source, family)
    for name, tensor in source.float_parts():
        yield float_entry(name_of(name), _as_llama_cpp(name, tensor, family), heads.get(name.rpartition(".")[0], 0))
    for path, layer in source.layers.items():
        name, kind = source.file_name(path), block_type(layer.scheme)
        shape = (layer.out_features, layer.in_features // BLOCK * kind.bytes)
        yield Entry(name_of(f"{name}.weight"), kind.name, shape, _maker(layer, kind, heads.get(name, 0)))
        if layer.bias is not None:
            yield float_entry(name_of(f"{name}.bias"), layer.bias, heads.get(name, 0))
    divisors = _divisors(source)
    if divisors is not None:
        yield float_entry("rope_freqs.weight", divisors, 0)


def rotated_heads(source: Source, family: GgufFamily) -> dict[str, int]:
    """Names of query and key projections whose rows trade places -> their heads."""
    if not family.interleaved:
        return {}
    config = source.model.config
    counts = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    names = (name for name, _ in source.model.named_modules())
    return {name: counts[end] for name in names if (end := name.rpartition(".")[2]) in counts}


def _as_llama_cpp(name: str, tensor: Tensor, family: GgufFamily) -> Tensor:
    """A float tensor as llama.cpp computes with it: vectors in float32, norms with their offset."""
    if tensor.ndim == 1:
        tensor = tensor.float()
    return tensor + family.norm_offset if family.norm_offset and name.endswith("norm.weight") else tensor


def float_entry(name: str, tensor: Tensor, heads: int) -> Entry:
    """A tensor that is on no grid, in its own dtype, vectors in float32; of `heads` whose rows trade places, if any.

    Raises:
        LlmqatError: if llama.cpp does not compute in its dtype.
    """
    tensor = tensor.float() if tensor.ndim == 1 else tensor
    if tensor.dtype not in TYPE_OF:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise LlmqatError(
            f"{name} is {dtype}, and llama.cpp computes in {', '.join(TYPE_OF.values())}; export to dense"
        )
    shape = (*tensor.shape[:-1], tensor.shape[-1] * tensor.itemsize)

    def make() -> Tensor:
        rows = swap_halves(tensor, heads) if heads else tensor
        return rows.contiguous().view(torch.uint8).view(shape)

    return Entry(name, TYPE_OF[tensor.dtype], shape, make)


def _maker(layer: PackedLinear, kind: BlockType, heads: int) -> Callable[[], Tensor]:
    def make() -> Tensor:
        blocks = to_blocks(*layer.unpack(), kind)
        return swap_halves(blocks, heads) if heads else blocks

    return make


def _divisors(source: Source) -> Tensor | None:
    frequencies = [tensor for name, tensor in source.model.named_buffers() if name.endswith("rotary_emb.inv_freq")]
    return rotary_divisors(source.model.config, frequencies[0]) if frequencies else None


def file_type(gguf: Any, found: list[Entry]) -> int:
    """The type of most layers, by which llama.cpp names the file."""
    counts = Counter(entry.kind for entry in found if entry.kind.startswith("Q"))
    return int(gguf.LlamaFileType[f"MOSTLY_{counts.most_common(1)[0][0]}"])
