"""GPTQ's checkpoints, of version 1 and 2; see `llmqat.formats.export.gptq` for their tensors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats.importing.grids import FLOATS, FoundLayer, group_size_of, part
from llmqat.quant.packing import unpack_rows
from llmqat.scheme import QuantScheme

VERSIONS = {"gptq": 1, "gptq_v2": 0}  # -> what is added to a stored zero point


def check_gptq(config: Mapping[str, Any]) -> None:
    """Refuse what only some loaders of GPTQ's checkpoints know.

    Raises:
        LlmqatError: naming it.
    """
    version = config.get("checkpoint_format", "gptq")
    if version not in VERSIONS:
        raise LlmqatError(f"this GPTQ checkpoint is laid out for {version}; llmqat imports {' and '.join(VERSIONS)}")


def gptq_zero_points(tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any]) -> Tensor:
    """Zero points of a layer ``(out, groups)``, uint8.

    Raises:
        LlmqatError: if version 1 holds one that is beyond the grid.
    """
    bits, rows = config["bits"], part(tensors, f"{name}.scales", FLOATS, (-1, -1)).shape[1]
    words = part(tensors, f"{name}.qzeros", (torch.int32,), (-1, -(-rows * bits // 32)))
    zero_point = unpack_rows(words, bits, rows).T + VERSIONS[config.get("checkpoint_format", "gptq")]
    if int(zero_point.max()) >= 2**bits:
        raise LlmqatError(
            f"{name} holds a zero point of {2**bits}, which version 1 of GPTQ's format stores for 0, and which its "
            "readers carry into the next one; give a checkpoint of gptq_v2"
        )
    return zero_point.contiguous()


def gptq_layer(
    tensors: Mapping[str, Tensor], name: str, config: Mapping[str, Any], zero_point: Tensor | None
) -> FoundLayer:
    """A layer, with the zero points of an asymmetric grid.

    Raises:
        LlmqatError: if a tensor is missing or of another shape, or groups are not of neighbours.
    """
    bits = config["bits"]
    scale = part(tensors, f"{name}.scales", FLOATS, (-1, -1))
    groups, rows = scale.shape
    words = part(tensors, f"{name}.qweight", (torch.int32,), (-1, rows))
    columns = words.shape[0] * 32 // bits
    scheme = QuantScheme(bits, group_size_of(columns, groups, config["group_size"], name), zero_point is None)
    index = tensors.get(f"{name}.g_idx")
    if index is not None:
        index = part(tensors, f"{name}.g_idx", (torch.int32, torch.int64), (columns,))
        if not torch.equal(index.long(), torch.arange(columns) // (columns // groups)):
            raise LlmqatError(
                f"{name}.g_idx does not put neighbours into groups (desc_act), as llmqat does; give a checkpoint that "
                "was made without, or the float model"
            )
    return FoundLayer(scheme, unpack_rows(words.T, bits, columns), scale.T, zero_point)
