"""`mlx`: the affine quantization of MLX, for mlx-lm and LM Studio on Apple silicon.

| tensor | dtype | shape | content |
|---|---|---|---|
| `weight` | uint32 | ``(out, words of in)`` | unsigned codes of a row in one bit stream, as in the packed file |
| `scales` | of the packed file | ``(out, groups)`` | of either sign |
| `biases` | of the packed file | ``(out, groups)`` | ``-scale * zero_point`` |

A weight is ``code * scale + bias``. The zero point of a symmetric grid is ``2^(bits - 1)``: the product is exact in any
dtype. That of an asymmetric grid makes it inexact, and it is rounded, where that is allowed.
https://github.com/ml-explore/mlx
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.formats.export.directory import moved, write_directory
from llmqat.formats.export.gguf_families import rotary
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear


def write_mlx(source: Source, scratch: Path) -> None:
    """Write the model to `scratch` with weights in MLX's format."""
    own = {source.file_name(path): _grid(layer) for path, layer in source.layers.items()}
    most = max(own.values(), key=list(own.values()).count)
    others = {name: grid for name, grid in own.items() if grid != most}
    write_directory(source, scratch, moved(source, mlx_layer), source.model.dtype, {"quantization": {**most, **others}})
    path = scratch / "config.json"
    config = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps(config | rotary_entries(source.model.config), indent=2) + "\n", "utf-8")


def rotary_entries(config: Any) -> dict[str, Any]:
    """The rotary embedding by the names of before transformers 5, which mlx-lm reads: it takes a family's default for
    what only ``rope_parameters`` says."""
    if not getattr(config, "rope_parameters", None):
        return {}
    kinds = rotary(config)
    full = kinds["full_attention"]
    found = {"rope_theta": full["rope_theta"]}
    if full.get("rope_type", "default") != "default":
        found["rope_scaling"] = {key: value for key, value in full.items() if key != "rope_theta"}
    if "partial_rotary_factor" in full:
        found["partial_rotary_factor"] = full["partial_rotary_factor"]
    if "sliding_attention" in kinds:
        found["rope_local_base_freq"] = kinds["sliding_attention"]["rope_theta"]
    return found


def mlx_layer(layer: PackedLinear) -> dict[str, Tensor]:
    """Tensors of a layer by their names in the format, but for its bias."""
    _, scale, zero_point = layer.unsigned()
    return {"weight": layer.weight_packed.view(torch.uint32), "scales": scale, "biases": -scale * zero_point}


def _grid(layer: PackedLinear) -> dict[str, Any]:
    return {"group_size": layer.scheme.group_length(layer.in_features), "bits": layer.scheme.bits}
