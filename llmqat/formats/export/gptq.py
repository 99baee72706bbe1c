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

import torch
from torch import Tensor

from llmqat.formats.export.directory import moved, write_directory
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.packing import pack_rows


def write_gptq(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` with weights in GPTQ's format."""
    scheme = next(iter(source.layers.values())).scheme
    quantization = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq" if scheme.symmetric else "gptq_v2",
        "bits": scheme.bits,
        "group_size": scheme.group_size,
        "sym": scheme.symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
    }
    write_directory(
        source, scratch, moved(source, gptq_layer), source.model.dtype, {"quantization_config": quantization}
    )


def gptq_layer(layer: PackedLinear) -> dict[str, Tensor]:
    """Tensors of a layer by their names in the format, but for its bias."""
    codes, scale, zero_point = layer.unsigned()
    groups, bits = scale.shape[1], layer.scheme.bits
    stored_zero = zero_point if not layer.scheme.symmetric else zero_point - 1
    return {
        "qweight": pack_rows(codes, bits).T,
        "qzeros": pack_rows(stored_zero.T.contiguous(), bits),
        "scales": scale.T.to(torch.float16),
        "g_idx": torch.arange(layer.in_features, dtype=torch.int32) // (layer.in_features // groups),
    }
