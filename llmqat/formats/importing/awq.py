"""AWQ's checkpoints, in their `gemm` version; see `llmqat.formats.export.awq` for their tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats.importing.grids import FLOATS, FoundLayer, group_size_of, part
from llmqat.quant.packing import unpack_rows
from llmqat.scheme import QuantScheme

# Where each row of the weight lies in a word; not taken from the writer, whose fault `verify` would then not see.
PLACES = [0, 4, 1, 5, 2, 6, 3, 7]


def check_awq(config: Mapping[str, Any]) -> None:
    """Refuse the layouts of AWQ that llmqat does not know.

    Raises:
        LlmqatError: naming it.
    """
    if config.get("version", "gemm") != "gemm" or config["bits"] != 4:
        raise LlmqatError(
            f"this AWQ checkpoint is of version {config.get('version')} with {config['bits']} bits; llmqat imports "
            "version gemm with 4"
        )


def awq_zero_points(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Tensor:
    """Zero points of a layer ``(out, groups)``, uint8."""
    rows = part(tensors, f"{name}.scales", FLOATS, (-1, -1)).shape[1]
    return _rows(part(tensors, f"{name}.qzeros", (torch.int32,), (-1, rows // 8)), rows)


def awq_layer(
    tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any], zero_point: Tensor | None
) -> FoundLayer:
    """A layer, with the zero points of an asymmetric grid.

    Raises:
        LlmqatError: if a tensor is missing or of another shape.
    """
    scale = part(tensors, f"{name}.scales", FLOATS, (-1, -1))
    groups, rows = scale.shape
    words = part(tensors, f"{name}.qweight", (torch.int32,), (-1, rows // 8))
    scheme = QuantScheme(4, group_size_of(len(words), groups, config["group_size"], name), zero_point is None)
    return FoundLayer(scheme, _rows(words, rows), scale.T, zero_point)


def _rows(words: Tensor, rows: int) -> Tensor:
    """4-bit codes ``(rows, n)`` of int32 ``(n, rows / 8)``."""
    ordered: Tensor = unpack_rows(words, 4, rows).unflatten(1, (-1, 8))
    return ordered[..., PLACES].flatten(1).T.contiguous()
