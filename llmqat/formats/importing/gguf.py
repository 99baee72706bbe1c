"""Layers of GGUF files in blocks of `Q4_0`, `Q5_0` and `Q8_0`; see `llmqat.formats.export.gguf_blocks` for these.

Everything else in the file, blocks of other types among it, becomes float, as by `--model FILE.gguf`.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf_blocks import BLOCK
from llmqat.formats.export.gguf_families import FAMILIES, GgufFamily
from llmqat.formats.importing.grids import FoundLayer
from llmqat.models.gguf_file import gguf_package, opened
from llmqat.quant.packing import to_unsigned
from llmqat.scheme import QuantScheme


def gguf_layers(path: Path, model: PreTrainedModel) -> dict[str, Callable[[], FoundLayer]]:
    """Layers of a file that are on one of our grids, and what makes them, by their names in the float model.

    Args:
        path: of the file.
        model: as transformers makes it of the file; meta tensors will do.

    Raises:
        LlmqatError: if the family is none whose tensors llmqat knows.
    """
    tensors = Tensors.of(path, model.config)
    layers: dict[str, Callable[[], FoundLayer]] = {}
    for name, module in model.named_modules():
        tensor = tensors.find(name) if isinstance(module, nn.Linear) else None
        if tensor is not None and tensor.tensor_type.name in INTEGERS:
            layers[name] = partial(from_blocks, tensor, rotated(name, model.config, tensors.family))
    return layers


class Tensors(NamedTuple):
    """The tensors of a file, which go by other names there.

    Attributes:
        family: of the file.
        names: of tensors in files of transformers -> in GGUF, as the gguf package has them.
        by_name: what the file holds.
    """

    family: GgufFamily
    names: Any
    by_name: dict[str, Any]

    @classmethod
    def of(cls, path: Path, config: Any) -> Self:
        """The tensors of the file `path` of a model with this config.

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
        names = gguf.get_tensor_name_map(key, config.num_hidden_layers)
        return cls(family, names, {tensor.name: tensor for tensor in reader.tensors})

    def find(self, layer: str) -> Any:
        """The weight of a layer; None if the file has none."""
        return self.by_name.get(self.name_of(layer))

    def name_of(self, layer: str) -> str:
        """The name of the weight of a layer in GGUF; empty where no model of the family has one."""
        found: str = self.names.get_name(f"{layer}.weight", try_suffixes=(".weight",)) or ""
        return found


def rotated(name: str, config: Any, family: GgufFamily) -> int:
    """Heads of a query or key projection whose rows have traded places in the file; 0 for other layers."""
    if not family.interleaved:
        return 0
    counts: dict[str, int] = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    return counts.get(name.rpartition(".")[2], 0)


def from_blocks(tensor: Any, heads: int) -> FoundLayer:
    """A layer of a tensor in blocks, its rows in the order of transformers.

    Integers of five bits are on our grid of 4 bits with zero points where those of every block span no more than it
    has, as those do which were exported from it; else on the symmetric one of 8 bits.
    """
    integers, scale = integers_of(tensor, heads)
    if tensor.tensor_type.name == "Q5_0":
        scheme, blocks = QuantScheme(4, BLOCK, False), integers.unflatten(1, (-1, BLOCK))
        zero_point = (-blocks.amin(-1)).clamp(0, scheme.qmax)
        codes = (blocks + zero_point.unsqueeze(-1)).flatten(1)
        if int(codes.min()) >= 0 and int(codes.max()) <= scheme.qmax:
            return FoundLayer(scheme, codes.to(torch.uint8), scale, zero_point.to(torch.uint8))
    scheme = QuantScheme(4 if tensor.tensor_type.name == "Q4_0" else 8, BLOCK)
    return FoundLayer(scheme, to_unsigned(integers, scheme), scale, None)


def integers_of(tensor: Any, heads: int) -> tuple[Tensor, Tensor]:
    """Weights ``(out, in)`` of a tensor in blocks as int16 multiples of their scales, and these, ``(out, in / 32)``;
    rows in the order of transformers."""
    columns, rows = (int(size) for size in tensor.shape)
    blocks = torch.from_numpy(tensor.data.copy()).view(rows, columns // BLOCK, -1)
    if heads:
        blocks = blocks.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
    scale = blocks[..., :2].contiguous().view(torch.float16).squeeze(-1)
    return INTEGERS[tensor.tensor_type.name](blocks[..., 2:]).flatten(1), scale


def _nibbles(stored: Tensor) -> Tensor:
    return torch.cat([stored & 15, stored >> 4], -1).short()


def _q5_0(stored: Tensor) -> Tensor:
    """The fifth bits of 32 weights are those of four bytes in front of the nibbles, the lowest first."""
    fifth = stored[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    return _nibbles(stored[..., 4:]) + 16 * fifth.flatten(-2) - 16


# Type of blocks -> the integers of the bytes behind their scales.
INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": lambda stored: _nibbles(stored) - 8,
    "Q5_0": _q5_0,
    "Q8_0": lambda stored: stored.contiguous().view(torch.int8).short(),
}
