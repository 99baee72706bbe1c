"""How far training has moved the codes of a model, counted on the device that trains."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmqat.mapped import Disk, release
from llmqat.models.patcher import OnGrid, quantized_layers
from llmqat.quant.packing import pack_rows, to_unsigned, unpack_rows


class CodeCounts(NamedTuple):
    """Shares of the codes of a model.

    Attributes:
        changed: that differ from the first ones.
        clipped: whose weights lie more than half a code beyond the ends of the grid.
        by_layer: `changed` of each layer.
    """

    changed: float
    clipped: float
    by_layer: dict[str, float]


class FirstCodes:
    """The codes of a model before training.

    Attributes:
        packed: by layer, on the CPU; one layer at a time goes where the model is.
        counts: of the model as it was.

    Args:
        model: prepared.
        disk: where they go; None keeps them in memory.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, disk: Disk | None = None) -> None:
        layers, put = quantized_layers(model), Tensor.cpu if disk is None else disk.put
        self.packed = {on_grid.name: put(_packed(on_grid)) for on_grid in layers}
        self.counts = _counts(layers, [torch.zeros((), dtype=torch.int64, device=_device(layer)) for layer in layers])

    @torch.no_grad()
    def compare(self, model: nn.Module) -> CodeCounts:
        """Counts of the model as it is now."""
        layers = quantized_layers(model)
        return _counts(layers, [self._changed(on_grid) for on_grid in layers])

    def _changed(self, on_grid: OnGrid) -> Tensor:
        """How many codes of a layer differ from the first ones, a scalar on its device."""
        scheme, codes = on_grid.layer.scheme, on_grid.codes()
        packed = self.packed[on_grid.name]
        first = unpack_rows(packed.to(codes.device), scheme.bits, codes.shape[1])
        release(packed)
        return (first != to_unsigned(codes, scheme)).sum()


def _packed(on_grid: OnGrid) -> Tensor:
    scheme = on_grid.layer.scheme
    return pack_rows(to_unsigned(on_grid.codes(), scheme), scheme.bits)


def _device(on_grid: OnGrid) -> torch.device:
    return on_grid.layer.scale.device


def _counts(layers: list[OnGrid], changed: list[Tensor]) -> CodeCounts:
    """Shares, by the numbers `changed` of codes; all that was counted leaves the device at once."""
    clipped = [on_grid.clipped() for on_grid in layers]
    flips, clips = torch.stack([torch.stack(changed), torch.stack(clipped)]).tolist()
    sizes = [on_grid.layer.weight.numel() for on_grid in layers]
    by_layer = {on_grid.name: count / size for on_grid, count, size in zip(layers, flips, sizes, strict=True)}
    return CodeCounts(sum(flips) / sum(sizes), sum(clips) / sum(sizes), by_layer)
