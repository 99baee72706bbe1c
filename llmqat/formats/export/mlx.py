"""`mlx`: the affine quantization of MLX, for mlx-lm and LM Studio on Apple silicon.

| tensor | dtype | shape | content |
|---|---|---|---|
| `weight` | uint32 | ``(out, words of in)`` | unsigned codes of a row in one bit stream, as in the packed file |
| `scales` | of the packed file | ``(out, groups)`` | of either sign |
| `biases` | of the packed file | ``(out, groups)`` | ``-2^(bits - 1) * scale``, exact in any dtype |

A weight is ``code * scale + bias``. For a symmetric grid that is ours; a zero point would need a rounded product.
https://github.com/ml-explore/mlx
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.formats.export.directory import moved, write_directory
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear


def write_mlx(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` with weights in MLX's format."""
    own = {source.file_name(path): _grid(layer) for path, layer in source.layers.items()}
    most = max(own.values(), key=list(own.values()).count)
    others = {name: grid for name, grid in own.items() if grid != most}
    write_directory(source, scratch, moved(source, mlx_layer), source.model.dtype, {"quantization": {**most, **others}})


def mlx_layer(layer: PackedLinear) -> dict[str, Tensor]:
    """Tensors of a layer by their names in the format, but for its bias."""
    return {
        "weight": layer.weight_packed.view(torch.uint32),
        "scales": layer.weight_scale,
        "biases": layer.weight_scale * layer.scheme.qmin,
    }


def _grid(layer: PackedLinear) -> dict[str, Any]:
    return {"group_size": layer.scheme.group_length(layer.in_features), "bits": layer.scheme.bits}
