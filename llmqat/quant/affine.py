"""Choose scales, quantize, dequantize: the arithmetic every other part of llmqat calls, and none repeats.

Shapes, everywhere in this package: `weight` and `codes` are ``(out, in)``, `scale` and `zero_point` are
``(out, in / group)``. A zero point is ``None`` for a symmetric scheme.

Two dtypes matter. Codes are found in float32 (float64 if the weight is float64). The dequantized weight is computed *in
the dtype of the scale*, the dtype it is stored in: ``codes - zero_point`` is exact there (at most 9 bits), so the
product is rounded once, and every reader of the file that multiplies in the file's dtype gets the same bits.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.scheme import QuantScheme

# A group of zeros among ordinary weights still needs a scale: this fraction of the largest weight of the tensor.
RELATIVE_SCALE_FLOOR = 1e-5


def grouped(tensor: Tensor, scheme: QuantScheme) -> Tensor:
    """View ``(out, in)`` as ``(out, groups, group)``."""
    groups: Tensor = tensor.unflatten(-1, (-1, scheme.group_length(tensor.shape[-1])))
    return groups


def smallest_scale(storage_dtype: torch.dtype) -> float:
    """The smallest positive number of a dtype that float32 holds as a normal one: float16 goes on below its own normal
    numbers, to 6e-8; float32 and bfloat16 end at 1.2e-38, because processors may take smaller ones for zero."""
    info = torch.finfo(storage_dtype)
    return max(info.smallest_normal * info.eps, torch.finfo(torch.float32).smallest_normal)


def check_weight(weight: Tensor, scheme: QuantScheme, storage_dtype: torch.dtype, name: str) -> None:
    """Refuse a weight that the grid cannot hold; one on the meta device is not looked at.

    Raises:
        LlmqatError: if it holds NaN or infinity, or values too large or too small for the storage dtype.
    """
    if weight.is_meta or not weight.numel():
        return
    low, high = (float(end) for end in weight.detach().aminmax())
    largest, dtype = max(-low, high), str(storage_dtype).removeprefix("torch.")
    if not math.isfinite(low) or not math.isfinite(high):
        raise LlmqatError(f"the weight of {name} holds NaN or infinity; copy the model again, or keep the layer float")
    # A grid reaches beyond the largest weight: by its own rounding, and by half a step where zero points are rounded.
    limit = torch.finfo(storage_dtype).max / (1.01 if scheme.symmetric else 1.5)
    if largest > limit:
        raise LlmqatError(
            f"the weight of {name} reaches {largest:.3g}, the grid holds {limit:.3g} in {dtype}; store the model in "
            "bfloat16 (storage_dtype=torch.bfloat16), or keep the layer float with an override"
        )
    if 0 < largest < smallest_scale(storage_dtype):
        raise LlmqatError(
            f"the weight of {name} reaches {largest:.3g} only, less than the smallest scale in {dtype}, "
            f"{smallest_scale(storage_dtype):.3g}; store the model in bfloat16 (storage_dtype=torch.bfloat16), or keep "
            "the layer float with an override"
        )


def check_storable(tensor: Tensor | None, dtype: torch.dtype, name: str) -> None:
    """Refuse a tensor that is not finite once it is stored in `dtype`; None, and one on the meta device, pass.

    Raises:
        LlmqatError: if it holds NaN or infinity, or values too large for `dtype`.
    """
    if tensor is None or tensor.is_meta or not tensor.numel():
        return
    ends = torch.stack(tensor.detach().aminmax())
    if not ends.isfinite().all():
        raise LlmqatError(f"{name} holds NaN or infinity; copy the model again, or train it with a lower learning rate")
    if not ends.to(dtype).isfinite().all():
        raise LlmqatError(
            f"{name} reaches {float(ends.abs().amax()):.3g}, and {str(dtype).removeprefix('torch.')} holds "
            f"{torch.finfo(dtype).max:.3g}; store the model in bfloat16 (storage_dtype=torch.bfloat16)"
        )


def store(scale: Tensor, floor: Tensor | float, dtype: torch.dtype) -> Tensor:
    """`scale` kept at least `floor` away from zero (its sign survives) and rounded to its storage dtype.

    Below the normal numbers of the dtype, where neighbours lie far apart, away from zero: a smaller scale would clip.
    """
    smallest, normal = smallest_scale(dtype), torch.finfo(dtype).smallest_normal
    magnitude = scale.abs().clamp(min=smallest)
    magnitude = magnitude.maximum(torch.as_tensor(floor, dtype=scale.dtype, device=scale.device))
    if smallest < normal:
        magnitude = torch.where(magnitude < normal, (magnitude / smallest).ceil() * smallest, magnitude)
    signed = torch.where(scale < 0, -magnitude, magnitude)
    return signed.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype)


def store_scale(scale: Tensor, floor: Tensor | float, scheme: QuantScheme, storage_dtype: torch.dtype) -> Tensor:
    """`store` for the scales of weights, which are numbers of the scheme's scale dtype too if it names one."""
    if scheme.scale_dtype is None:
        return store(scale, floor, storage_dtype)
    return store(scale, floor, getattr(torch, scheme.scale_dtype)).to(storage_dtype)


def round_scale(scale: Tensor, scheme: QuantScheme, storage_dtype: torch.dtype) -> Tensor:
    """Trained scales as a file holds them: in the storage dtype, as numbers of the scale dtype that a scheme names."""
    return (scale if scheme.scale_dtype is None else scale.to(getattr(torch, scheme.scale_dtype))).to(storage_dtype)


def scale_floor(weight: Tensor) -> Tensor:
    """Smallest scale magnitude allowed for `weight`: relative to its largest entry; 1 where all of it is zero."""
    largest = weight.abs().amax().to(torch.float32)
    return torch.where(largest > 0, largest * RELATIVE_SCALE_FLOOR, torch.ones_like(largest))


class Ranges(NamedTuple):
    """The range of each group of a weight, from which its scales follow.

    Attributes:
        low: the least entry or zero, ``(out, groups)`` float32; for a symmetric scheme the entry of largest magnitude.
        high: the greatest entry or zero; None for a symmetric scheme.
        floor: smallest scale magnitude, see `scale_floor`.
    """

    low: Tensor
    high: Tensor | None
    floor: Tensor

    def rows(self, rows: slice) -> "Ranges":
        """The ranges of some rows of the weight."""
        return Ranges(self.low[rows], None if self.high is None else self.high[rows], self.floor)

    def scale(
        self, scheme: QuantScheme, storage_dtype: torch.dtype, shrink: float = 1.0, flip: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero point of the ranges times `shrink`; see `choose_scale`."""
        if self.high is None:
            sign = -1.0 if flip else 1.0
            return store_scale(self.low * (sign * shrink / scheme.qmin), self.floor, scheme, storage_dtype), None
        scale = store_scale((self.high - self.low) * (shrink / scheme.qmax), self.floor, scheme, storage_dtype)
        return scale, (-shrink * self.low / scale.float()).round().clamp(scheme.qmin, scheme.qmax)


def ranges_of(weight: Tensor, scheme: QuantScheme) -> Ranges:
    """The range of each group of `weight`."""
    w, floor = grouped(weight.float(), scheme), scale_floor(weight)
    if scheme.symmetric:
        return Ranges(w.gather(-1, w.abs().argmax(-1, keepdim=True)).squeeze(-1), None, floor)
    return Ranges(w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0), floor)


def choose_scale(weight: Tensor, scheme: QuantScheme, storage_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point of round-to-nearest, from the range of each group.

    Symmetric: the entry of largest magnitude maps to ``-2^(bits-1)``, so the scale is negative where that entry is
    positive and the whole range is used (the convention of GGUF's Q4_0); `Ranges.scale` can `flip` the sign.
    Asymmetric: the range from the least to the greatest entry, widened to hold zero.

    Returns:
        scale ``(out, groups)`` in `storage_dtype`; zero_point ``(out, groups)`` float32 holding integers, or None.
    """
    return ranges_of(weight, scheme).scale(scheme, storage_dtype)


def quantize(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Codes ``clamp(round(weight / scale) + zero_point)``, half to even; int8 if symmetric, else uint8."""
    codes = code_values(weight, scale, zero_point, scheme)
    return codes.to(torch.int8 if scheme.symmetric else torch.uint8)


def code_values(weight: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """The codes of `quantize`, still in floating point (float32, or float64 for a float64 weight)."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    v = (grouped(weight.to(dtype), scheme) / scale.to(dtype).unsqueeze(-1)).round_()
    if zero_point is not None:
        v += zero_point.to(dtype).unsqueeze(-1)
    return v.clamp_(scheme.qmin, scheme.qmax).flatten(-2)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: QuantScheme) -> Tensor:
    """``scale * (codes - zero_point)`` in the dtype of `scale`, rounded once."""
    c = grouped(codes.to(scale.dtype), scheme)
    if zero_point is not None:
        c = c - zero_point.to(scale.dtype).unsqueeze(-1)
    return (c * scale.unsqueeze(-1)).flatten(-2)


def holds_exactly(dtype: torch.dtype, numbers: Tensor) -> bool:
    """Whether a dtype holds all of some numbers as they are."""
    return torch.equal(numbers.to(dtype).to(numbers.dtype), numbers)


def on_grid(weight: Tensor, scheme: QuantScheme, storage_dtype: torch.dtype) -> Tensor:
    """`weight` ``(out, in)`` rounded to nearest on the grid of `scheme`, in float32."""
    scale, zero_point = choose_scale(weight, scheme, storage_dtype)
    return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme).float()


def quotient(x: Tensor, divisor: float) -> Tensor:
    """``x / divisor`` rounded once on every device: by a Python number, GPUs multiply by its rounded reciprocal."""
    return x / x.new_full((), divisor)


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """Dynamic int8, per token and symmetric: ``scale = absmax / 127`` over the last dimension.

    Returns:
        codes, int8, shaped like `x`; scale ``(..., 1)``, float32 or wider. A token of zeros gets scale 1. A token
        with a NaN or an infinity gets scale NaN, so that all that is computed of it is NaN: no code stands for either.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    absmax = x.abs().amax(-1, keepdim=True)
    scale = torch.where(absmax > 0, quotient(absmax, 127), torch.ones_like(absmax))
    scale = scale.masked_fill(~absmax.isfinite(), torch.nan)
    return (x / scale).round_().clamp_(-127, 127).to(torch.int8), scale


def dequantize_activation(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale * codes`` in float32 or wider, rounded once to `dtype`."""
    return (codes * scale).to(dtype)


def fake_quantize_activation(x: Tensor) -> Tensor:
    """`x` after a trip through `quantize_activation`, in its own dtype."""
    return dequantize_activation(*quantize_activation(x), x.dtype)


def fake_quantize_static(x: Tensor, scale: Tensor) -> Tensor:
    """`x` on one symmetric int8 grid for the whole tensor, in its own dtype; `scale` is ``(1,)``, any float dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
    s = scale.to(wide)
    return ((x.to(wide) / s).round_().clamp_(-128, 127) * s).to(x.dtype)


def fake_quantize_input(x: Tensor, scheme: QuantScheme, scale: Tensor | None) -> Tensor:
    """The input of a layer as its weight multiplies it, in its own dtype.

    Args:
        x: ``(..., in)``.
        scheme: of the layer.
        scale: ``(1,)``, of static inputs; None for others.
    """
    if scheme.inputs == "static":
        assert scale is not None
        return fake_quantize_static(x, scale)
    return fake_quantize_activation(x) if scheme.inputs == "dynamic" else x
