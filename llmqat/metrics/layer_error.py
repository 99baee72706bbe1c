"""How far the output of each layer is from the float model's, measured while the two score the same tokens."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from llmqat.models.patcher import plain_model

# Every 127th token is compared: a prime, so that samples wander through windows of any usual length.
STRIDE = 127


class LayerErrors:
    """``||y - y_float||^2 / ||y_float||^2`` of each layer's output, over a sample of the tokens.

    `y` is computed on the quantized prefix and `y_float` on the float one: what reaches the layer counts, not its own
    rounding alone, so that a layer which makes up for those before it shows.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self.totals = {name: (0.0, 0.0) for name in names}

    @contextmanager
    def outputs(self, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        """Collect the outputs ``(tokens / STRIDE, out)`` of one forward of `model` inside the ``with``, by layer."""
        found: dict[str, Tensor] = {}

        def keep(name: str) -> object:
            def hook(_: nn.Module, args: object, output: Tensor) -> None:
                # A copy, always: a view would keep the outputs of all tokens of all layers in memory.
                found[name] = output.detach().flatten(0, -2)[::STRIDE].to(torch.float32, copy=True)

            return plain_model(model).get_submodule(name).register_forward_hook(hook)

        handles = [keep(name) for name in self.totals]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()  # type: ignore[attr-defined]

    def add(self, outputs: dict[str, Tensor], targets: dict[str, Tensor]) -> None:
        """Count a batch: outputs of the quantized model against those of the float one."""
        for name, y in outputs.items():
            error, power = self.totals[name]
            target = targets[name]
            self.totals[name] = (error + float((y - target).square().sum()), power + float(target.square().sum()))

    def result(self) -> dict[str, float]:
        """Relative squared error by layer."""
        return {name: error / max(power, 1e-30) for name, (error, power) in self.totals.items()}
