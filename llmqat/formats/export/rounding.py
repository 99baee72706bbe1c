"""The loss of an export to a format that rounds scales or minima of a grid, measured over all weights."""

from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.formats.export.holds import Holds
from llmqat.formats.export.source import Source
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import dequantize


class Rounding(NamedTuple):
    """The difference between the weights that were trained and those of an exported model, without the engine's own.

    Attributes:
        layers: how many have weights that differ.
        error: norm of all differences over that of all weights.
        steps: the largest difference, as a fraction of the step of its group.
    """

    layers: int
    error: float
    steps: float

    def __str__(self) -> str:
        return (
            f"{self.layers} layers were rounded: relative error {self.error:.1e}, no weight by more than "
            f"{self.steps:.1e} of a step of its grid"
        )


def measure_rounding(source: Source, holds: Holds) -> Rounding | None:
    """Compare the weights of a packed model with those that a format makes of them; None where they are the same."""
    layers, steps, wrong, right = 0, 0.0, 0.0, 0.0
    for layer in source.layers.values():
        codes, scale, zero_point = layer.unpack()
        weight = dequantize(codes, scale.double(), zero_point, layer.scheme)
        error = _exported(layer, holds) - weight
        layers += bool(error.any())
        of_step = error.unflatten(1, (scale.shape[1], -1)) / scale.double().abs().clamp_min(1e-300).unsqueeze(-1)
        steps = max(steps, float(of_step.abs().max()))
        wrong, right = wrong + float(error.square().sum()), right + float(weight.square().sum())
    return Rounding(layers, (wrong / right) ** 0.5, steps) if layers else None


def _exported(layer: PackedLinear, holds: Holds) -> Tensor:
    """The dequantized weights of the format ``(out, in)``, in float64."""
    codes, scale, zero_point = layer.unpack()
    stored = scale if holds.scale_dtype is None else scale.to(getattr(torch, holds.scale_dtype))
    if zero_point is None or layer.scheme.bits not in holds.rounded:
        return dequantize(codes, stored.double(), zero_point, layer.scheme)
    minimum = stored.double() * zero_point
    shifted = dequantize(codes, stored.double(), torch.zeros_like(zero_point), layer.scheme)
    return shifted - minimum.to(scale.dtype).double().repeat_interleave(codes.shape[1] // scale.shape[1], 1)
