"""`awq`: AWQ's checkpoints in their `gemm` version, for vLLM, SGLang and, through GPTQModel, transformers.

| tensor | dtype | shape | content |
|---|---|---|---|
| `qweight` | int32 | ``(in, out / 8)`` | 4-bit codes of 8 rows of the weight a word, in the order of `ORDER` |
| `qzeros` | int32 | ``(groups, out / 8)`` | zero points, likewise; 8 for a symmetric grid |
| `scales` | float16 | ``(groups, out)`` | of either sign |

https://github.com/casper-hansen/AutoAWQ
"""

from pathlib import Path

import torch
from torch import Tensor

from llmqat.formats.export.directory import moved, write_directory
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.packing import pack_rows

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the rows of the weight in a word, lowest bits first


def write_awq(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` with weights in AWQ's format."""
    scheme = next(iter(source.layers.values())).scheme
    quantization = {
        "quant_method": "awq",
        "version": "gemm",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "zero_point": True,
        "modules_to_not_convert": source.float_linears() or None,
    }
    write_directory(
        source, scratch, moved(source, awq_layer), source.model.dtype, {"quantization_config": quantization}
    )


def awq_layer(layer: PackedLinear) -> dict[str, Tensor]:
    """Tensors of a layer by their names in the format, but for its bias."""
    codes, scale, zero_point = layer.unsigned()
    return {"qweight": _words(codes.T), "qzeros": _words(zero_point.T), "scales": scale.T.to(torch.float16)}


def _words(codes: Tensor) -> Tensor:
    """4-bit codes ``(rows, out)`` as int32 ``(rows, out / 8)``."""
    ordered: Tensor = codes.unflatten(1, (-1, 8))[..., list(ORDER)]
    return pack_rows(ordered.flatten(1), 4)
