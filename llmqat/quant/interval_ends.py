"""Weights at the ends of their codes' intervals, where the least step of training gives them another code."""

import math

import torch
from torch import Tensor

from llmqat.quant.affine import grouped
from llmqat.quant.grid import Grid, Latent


@torch.no_grad()
def away_from_ends(weight: Tensor, grid: Grid, margin: float) -> Tensor:
    """Weights of which none lies closer than a margin to the code next to its own; each keeps its code.

    Training through the straight-through estimator leaves many there: one whose best value lies between two codes is
    driven to the boundary, and swings about it (Nagel et al., arXiv 2203.11086, section 2). What trains next would flip
    thousands of codes in its first steps, whose gradients are mostly noise.

    Args:
        weight: of a layer ``(out, in)``; not written to.
        grid: that finds the codes.
        margin: see `inside_intervals`.
    """
    moved, grid = weight.clone(), grid.stored()
    for rows in Latent(weight).chunks():
        part, before = grid.rows(rows), weight[rows]
        codes = part.code_values(before)
        after = inside_intervals(before, codes, part, margin).to(weight.dtype)
        moved[rows] = torch.where(part.code_values(after) == codes, after, before)
    return moved


def inside_intervals(weight: Tensor, codes: Tensor, grid: Grid, margin: float) -> Tensor:
    """The values next to some weights that lie at least a margin inside the intervals of given codes; weights that do
    are returned as they are. A group whose scale is 0 has none, and gives NaN.

    Args:
        weight: ``(rows, in)``.
        codes: of the same shape, floating point, in float32 or wider.
        grid: `stored`, and that of these rows.
        margin: in codes. There is none at the outer ends of the grid.
    """
    scale, scheme = grid.scale_of_codes.to(codes.dtype).unsqueeze(-1), grid.scheme
    weight, codes = grouped(weight.to(codes.dtype), scheme), grouped(codes, scheme)
    middle = codes if grid.zero_point is None else codes - grid.zero_point.to(codes.dtype).unsqueeze(-1)
    lowest = torch.where(codes > scheme.qmin, margin - 0.5, -math.inf)
    highest = torch.where(codes < scheme.qmax, 0.5 - margin, math.inf)
    offset = weight / scale - middle
    nearer = offset.clamp(lowest, highest)
    return torch.where(nearer == offset, weight, (middle + nearer) * scale).flatten(-2)
