"""Latents of the codes that were found for a layer: as its weight, or as a change in a byte an entry beside it."""

import torch
from torch import Tensor

from llmqat.kernels.grid_rows import codes_of
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.affine import grouped, quotient, smallest_scale
from llmqat.quant.grid import Compensation, Grid, Latent


def take_latent(layer: FakeQuantLinear, latent: Tensor, keep_float: bool) -> None:
    """Let a layer, on its grid, have the codes of a latent ``(out, in)``: as its weight, or as a change beside the
    float weight, which stays."""
    if keep_float:
        layer.compensation = compensation_of(layer.weight.detach().to(latent.dtype), latent, layer.grid)
    else:
        layer.weight.data = latent


@torch.no_grad()
def compensation_of(weight: Tensor, latent: Tensor, grid: Grid) -> Compensation:
    """The change that gives `weight` the codes of `latent` when added, both ``(out, in)``.

    ``latent - weight`` in steps of 1/127 of the largest change in the group, rounded to the nearest, and in finer steps
    of a wider integer where int8 would cost a code. Weights less than a step from an end of their code's interval take
    the outermost step inside: they are the first to change their code in training, and rounding alone would push half
    of those next to the end over it, so that fewer are left where the first steps of training reach.
    """
    codes, change = codes_of(Latent(latent), grid), latent - weight
    to_middle = grid.stored().dequantize(codes).float() - weight
    outward = (change - to_middle).sign()
    largest = grouped(torch.maximum(change.abs(), to_middle.abs()), grid.scheme).amax(-1)
    for dtype in (torch.int8, torch.int16, torch.int32):
        limit = torch.iinfo(dtype).max
        step = quotient(largest, limit).clamp(min=smallest_scale(torch.bfloat16)).to(torch.bfloat16)
        steps = step.float().unsqueeze(-1).expand_as(grouped(weight, grid.scheme)).flatten(-2)
        near_end = codes_of(Latent(latent + outward * steps), grid) != codes
        nearest, multiples = (change / steps).round_(), (to_middle / steps).round_()
        for further in (-1, 0, 1):  # the last one that keeps the code
            other = (nearest + further * outward).clamp_(-limit, limit)
            kept = codes_of(Latent(weight, Compensation(other, step)), grid) == codes
            multiples = torch.where(kept & near_end if further > 0 else kept, other, multiples)
        found = Compensation(multiples.to(dtype), step)
        if torch.equal(codes_of(Latent(weight, found), grid), codes):
            break
    return found
