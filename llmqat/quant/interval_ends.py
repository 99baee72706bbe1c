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
        margin: in codes, less than a half. There is none at the outer ends of the grid.
    """
    moved, grid = weight.clone(), grid.stored()
    for rows in Latent(weight).chunks():
        part, before = grid.rows(rows), weight[rows]
        codes = part.code_values(before)
        after = _inwards(before, codes, part, 0.5 - margin).to(weight.dtype)
        moved[rows] = torch.where(part.code_values(after) == codes, after, before)
    return moved


def _inwards(weight: Tensor, codes: Tensor, grid: Grid, limit: float) -> Tensor:
    """Some rows, brought so near to the middle of their intervals; those that were are left as they are."""
    scale = (grid.scale if grid.code_scale is None else grid.code_scale).to(codes.dtype).unsqueeze(-1)
    zero_point = 0 if grid.zero_point is None else grid.zero_point.unsqueeze(-1)
    codes = grouped(codes, grid.scheme)
    offset = grouped(weight.to(codes.dtype), grid.scheme) / scale - (codes - zero_point)
    lowest = torch.where(codes > grid.scheme.qmin, -limit, -math.inf)
    highest = torch.where(codes < grid.scheme.qmax, limit, math.inf)
    nearer = offset.clamp(lowest, highest)
    moved = (codes - zero_point + nearer) * scale
    return torch.where(nearer == offset, grouped(weight, grid.scheme).to(moved.dtype), moved).flatten(-2)
