"""Where the weights behind the codes lie when training begins: near the ends of their codes' intervals, or not."""

import torch
from torch import Tensor, nn

from llmqat.algorithms.compensation import compensation_of
from llmqat.kernels.grid_rows import codes_of
from llmqat.mapped import Disk
from llmqat.models.patcher import OnGrid, quantized_layers
from llmqat.quant.grid import Compensation
from llmqat.quant.interval_ends import away_from_ends

# Loss -> margin, in codes. Distillation begins next to its goal: its first gradients are noise, and flip codes for the
# worse. Cross-entropy has far to go by small changes of all weights, which show only in the codes next to an end.
MARGIN = {"kd": 0.05, "ce": 0.0}


@torch.no_grad()
def keep_from_ends(model: nn.Module, margin: float, disk: Disk | None = None) -> None:
    """Move the weights behind the codes so that each lies a margin inside its code's interval; see `away_from_ends`.

    Weights that train are moved themselves; under adapters, GPTQ's change of the float weight, or the weight that has
    it in it. Float weights that were rounded to nearest stay as they are there. No code changes.

    Args:
        model: prepared, with `requires_grad` set.
        margin: in codes.
        disk: where changes go that lie in files.
    """
    if not margin:
        return
    for on_grid in quantized_layers(model):
        layer, adapters = on_grid.layer, on_grid.adapters
        if not layer.enabled:
            continue
        if adapters is not None and layer.compensation is not None:
            layer.compensation = _change_inside(on_grid, margin, disk)
        elif layer.weight.requires_grad or (adapters is not None and not layer.holds_float):
            layer.weight.data = _weight_inside(on_grid, margin)
        on_grid.release()


def _change_inside(on_grid: OnGrid, margin: float, disk: Disk | None) -> Compensation:
    """GPTQ's change of a weight that keeps the margin."""
    layer, latent = on_grid.layer, on_grid.layer.latent(on_grid.adapters)
    goal = away_from_ends(latent.rows(slice(None)), layer.grid, margin)
    multiples, step = compensation_of(latent._replace(compensation=None).rows(slice(None)), goal, layer.grid)
    return Compensation(multiples if disk is None else disk.put(multiples), step)


def _weight_inside(on_grid: OnGrid, margin: float) -> Tensor:
    """A weight that keeps the margin, with all that is added to it."""
    grid, latent = on_grid.layer.grid, on_grid.layer.latent(on_grid.adapters)
    weight, before = latent.weight.detach(), latent.rows(slice(None))
    moved = weight + (away_from_ends(before, grid, margin) - before).to(weight.dtype)
    kept = codes_of(latent._replace(weight=moved), grid) == codes_of(latent, grid)
    return torch.where(kept, moved, weight)
