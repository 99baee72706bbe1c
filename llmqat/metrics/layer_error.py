"""How far the output of each layer is from the float model's, measured while the two score the same tokens."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmqat.models.experts import EXPERT
from llmqat.models.patcher import transformers_model
from llmqat.nn.linear_like import LINEAR_LAYERS, linear_shape

# Every 127th token is compared: a prime, so that samples wander through windows of any usual length.
STRIDE = 127


@contextmanager
def sampled_outputs(model: nn.Module, names: Collection[str], tokens: int) -> Iterator[dict[str, Tensor]]:
    """Collect the outputs ``(tokens / STRIDE, out)`` of the layers `names`, but for those of experts, in one forward of
    `model` inside the ``with``."""
    found: dict[str, Tensor] = {}
    modules = dict(transformers_model(model).named_modules()) if names else {}
    watched = {name: modules[name] for name in names if name in modules and not EXPERT.search(name)}
    room = Room(-(-tokens // STRIDE) * sum(map(output_width, watched.values())))

    def keep(name: str, module: nn.Module) -> torch.utils.hooks.RemovableHandle:
        def hook(_: nn.Module, args: object, output: Tensor) -> None:
            rows = output.detach().flatten(0, -2)
            if len(rows) == tokens:
                # A copy, always: a view would keep the outputs of all tokens of all layers in memory.
                found[name] = room.copy(rows[::STRIDE])

        return module.register_forward_hook(hook)

    handles = [keep(name, module) for name, module in watched.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Room:
    """One piece of memory for many small tensors: each on its own would stay in a gap between the large ones of a
    forward, which then fits none of them again. SmolLM2-135M took 1.3 GB for the activations of 0.1 GB.

    Args:
        size: numbers that it holds.
    """

    def __init__(self, size: int) -> None:
        self.size, self.used, self.memory = size, 0, torch.empty(0)

    def copy(self, values: Tensor) -> Tensor:
        """A copy of `values`, of the dtype and device of the first; in a place of its own where there is no room."""
        if self.used == 0:
            self.memory = values.new_empty(self.size)
        start, self.used = self.used, self.used + values.numel()
        if self.used > self.size or values.dtype != self.memory.dtype:
            return values.clone()
        return self.memory[start : self.used].view_as(values).copy_(values)


def output_width(layer: nn.Module) -> int:
    """Numbers that a linear layer, float, on a grid or packed, gives for a token; 0 for what is none of these."""
    base = getattr(layer, "base_layer", layer)
    return linear_shape(base)[0] if isinstance(base, LINEAR_LAYERS) else getattr(base, "out_features", 0)


class LayerErrors:
    """``||y - y_float||^2 / ||y_float||^2`` of each layer's output, over a sample of the tokens.

    `y` is computed on the quantized prefix and `y_float` on the float one: what reaches the layer counts, not its own
    rounding alone, so that a layer which makes up for those before it shows. A layer that does not see every token in
    both models, such as an expert, whose tokens the router chooses, has no such error and is left out.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.names = list(names)
        self.totals: dict[str, tuple[float, float]] = {}

    def add(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        """Count a batch: outputs of the quantized model against those of the float one."""
        for name in outputs.keys() & targets.keys():
            error, power = self.totals.get(name, (0.0, 0.0))
            y, target = outputs[name].float(), targets[name].to(outputs[name].device).float()
            self.totals[name] = (error + float((y - target).square().sum()), power + float(target.square().sum()))

    def extend(self, others: "LayerErrors") -> None:
        """Count what `others` have counted."""
        for name, (error, power) in others.totals.items():
            before = self.totals.get(name, (0.0, 0.0))
            self.totals[name] = (before[0] + error, before[1] + power)

    def result(self) -> dict[str, float]:
        """Relative squared error by layer, in the order in which they were named."""
        shares = {name: error / max(power, 1e-30) for name, (error, power) in self.totals.items()}
        return {name: shares[name] for name in self.names if name in shares}
