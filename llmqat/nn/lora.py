"""LoRA inside the quantizer: ``Q(W + (alpha / r) B A) x``, as a peft layer.

An adapter beside the quantizer, ``Q(W) x + B A x``, is lost when it is merged into int4. Inside, the adapted weight is
what gets codes, so packing loses nothing (LR-QAT, arXiv 2406.06385, section 3).
"""

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from llmqat.compat.torch import KeepsDtypes
from llmqat.errors import LlmqatError
from llmqat.kernels import grid_rows
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.full_float32 import full_float32
from llmqat.quant.grid import Adapters, Latent


class LoraFakeQuantLinear(KeepsDtypes, LoraLayer):
    """A `FakeQuantLinear` with adapters inside its quantizer. `lora_A` ``(r, in)`` and `lora_B` ``(out, r)`` are saved
    and loaded by peft like those of any Linear, and stay float32 masters.

    Attributes:
        enabled: False leaves the adapters out, like peft's own switch, which also changes what trains.
    """

    base_layer: FakeQuantLinear
    enabled = True

    def __init__(
        self,
        base_layer: FakeQuantLinear,
        adapter_name: str,
        config: LoraConfig,
        r: int,
        lora_alpha: float,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # peft finds the features of any layer by name
            LoraLayer.__init__(self, base_layer)
        if config.lora_dropout or config.use_dora or config.lora_bias:
            raise LlmqatError(
                "lora_dropout, use_dora and lora_bias have no meaning for an adapter inside the quantizer; leave "
                "them out"
            )
        self.set_adapter(adapter_name)
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[arg-type]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``A (r, in)`` and ``B (out, r)`` of an adapter."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b

    def adapters(self) -> Adapters | None:
        """The active, unmerged adapters, several laid side by side along r; None if there are none."""
        names = self._unmerged(self.active_adapters)
        return self._side_by_side(names) if names and self.enabled and not self.disable_adapters else None

    def _unmerged(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.lora_A and name not in self.merged_adapters]

    def _side_by_side(self, names: list[str]) -> Adapters:
        if len(names) == 1:
            return Adapters(*self.factors(names[0]), self.scaling[names[0]])
        scaled = [self.factors(name)[1] * self.scaling[name] for name in names]
        return Adapters(torch.cat([self.factors(name)[0] for name in names]), torch.cat(scaled, dim=1), 1.0)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Weights of all adapters, active or not."""
        return [*self.lora_A.parameters(), *self.lora_B.parameters()]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        y: Tensor = self.base_layer(x, self.adapters())
        return y

    @full_float32()
    def get_delta_weight(self, adapter: str) -> Tensor:
        """``(alpha / r) B A``, ``(out, in)`` float32."""
        a, b = self.factors(adapter)
        delta: Tensor = self.scaling[adapter] * (b.float() @ a.float())
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the float master, inside the quantizer, by the forward's operations: codes stay the same."""
        names = self._unmerged(self.active_adapters if adapter_names is None else adapter_names)
        for name in names if safe_merge else ():
            if not torch.isfinite(self.get_delta_weight(name)).all():
                raise LlmqatError(f"adapter {name!r} holds non-finite weights; train again with a lower learning rate")
        if names:
            layer = self.base_layer
            weight = layer.weight.data = layer.weight.data.to(layer.compute_dtype)  # the sum is no stored weight
            grid_rows.merge(Latent(weight, None, self._side_by_side(names)), layer.grid)
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the master again, up to float32 rounding."""
        while self.merged_adapters:
            self.base_layer.weight.data -= self.get_delta_weight(self.merged_adapters.pop())
