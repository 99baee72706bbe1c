"""`gptq`: the format of GPTQ's checkpoints, for vLLM, SGLang, GPTQModel and, through that, transformers.

| tensor | dtype | shape | content |
|---|---|---|---|
| `qweight` | int32 | ``(words of in, out)`` | unsigned codes, a row of the weight in one stream, lowest bits first |
| `qzeros` | int32 | ``(groups, words of out)`` | zero points of a group likewise; less one in version 1 |
| `scales` | float16 | ``(groups, out)`` | of either sign |
| `g_idx` | int32 | ``(in,)`` | the group of each column of the weight |

Symmetric grids go into version 1, which every engine reads. Asymmetric ones need version 2 (`gptq_v2`): version 1 has
no zero point of 0, and its readers carry the one that they add into the next zero point.
https://github.com/ModelCloud/GPTQModel
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.formats.export.directory import moved, write_directory
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.packing import pack_rows


def write_gptq(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` with weights in GPTQ's format."""
    entries = {"quantization_config": gptq_entries(source)}
    write_directory(source, scratch, moved(source, gptq_layer), source.model.dtype, entries)


def gptq_entries(source: Source) -> dict[str, Any]:
    """The grid of a model as config.json names it."""
    scheme = next(iter(source.layers.values())).scheme
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }


def gptq_layer(layer: PackedLinear) -> dict[str, Tensor]:
    """Tensors of a layer by their names in the format, but for its bias."""
    return gptq_tensors(layer, 1 if layer.scheme.symmetric else 2, torch.float16)


def gptq_tensors(layer: PackedLinear, version: int, scale_dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of a layer in a version of the format; in version 1 a zero point of 0 wraps around."""
    codes, scale, zero_point = layer.unsigned()
    groups, bits = scale.shape[1], layer.scheme.bits
    stored_zero = zero_point if version == 2 else (zero_point - 1) & (2**bits - 1)
    return {
        "qweight": pack_rows(codes, bits).T,
        "qzeros": pack_rows(stored_zero.T.contiguous(), bits),
        "scales": scale.T.to(scale_dtype),
        "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // (layer.in_features // groups),
    }
