"""Layers of GGUF files in blocks of `Q4_0` and `Q8_0`; see `llmqat.formats.export.gguf_blocks` for these.

Everything else in the file, blocks of other types among it, becomes float, as by `--model FILE.gguf`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf_blocks import BLOCK
from llmqat.formats.export.gguf_families import FAMILIES, GgufFamily
from llmqat.formats.importing.grids import FoundLayer
from llmqat.models.gguf_file import gguf_package, opened
from llmqat.scheme import QuantScheme

SCHEMES = {"Q4_0": QuantScheme(4, BLOCK), "Q8_0": QuantScheme(8, BLOCK)}


def gguf_layers(path: Path, model: PreTrainedModel) -> dict[str, Callable[[], FoundLayer]]:
    """Layers of a file that are on one of our grids, and what makes them, by their names in the float model.

    Args:
        path: of the file.
        model: as transformers makes it of the file; meta tensors will do.

    Raises:
        LlmqatError: if the family is none whose tensors llmqat knows.
    """
    reader, gguf = opened(path), gguf_package()
    architecture = reader.fields["general.architecture"].contents()
    family = next((row for row in FAMILIES.values() if row.architecture == architecture), None)
    if family is None:
        known = ", ".join(sorted({row.architecture for row in FAMILIES.values()}))
        raise LlmqatError(f"{path} is of the family {architecture}, and llmqat imports {known}; use it by --model")
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    layers: dict[str, Callable[[], FoundLayer]] = {}
    for name, module in model.named_modules():
        found = names.get_name(f"{name}.weight", try_suffixes=(".weight",)) if isinstance(module, nn.Linear) else None
        tensor = tensors.get(found)
        if tensor is not None and tensor.tensor_type.name in SCHEMES:
            layers[name] = partial(from_blocks, tensor, rotated(name, model.config, family))
    return layers


def rotated(name: str, config: Any, family: GgufFamily) -> int:
    """Heads of a query or key projection whose rows have traded places in the file; 0 for other layers."""
    if not family.interleaved:
        return 0
    counts: dict[str, int] = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(name.rpartition(".")[2], 0)


def from_blocks(tensor: Any, heads: int) -> FoundLayer:
    """A layer of a tensor in blocks, its rows in the order of transformers."""
    columns, rows = (int(size) for size in tensor.shape)
    scheme = SCHEMES[tensor.tensor_type.name]
    blocks = torch.from_numpy(tensor.data.copy()).view(rows, columns // BLOCK, -1)
    if heads:
        blocks = blocks.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return FoundLayer(scheme, _codes(blocks[..., 2:], scheme.bits).flatten(1), scale, None)


def _codes(stored: Tensor, bits: int) -> Tensor:
    """Codes from 0, uint8, of the bytes of blocks behind their scales."""
    if bits == 8:
        return (stored.contiguous().view(torch.int8).int() + 128).to(torch.uint8)
    return torch.cat([stored & 15, stored >> 4], -1)
