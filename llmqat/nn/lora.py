"""LoRA inside the quantizer: ``Q(W + (alpha / r) B A) x``, as a peft layer.

An adapter beside the quantizer, ``Q(W) x + B A x``, is lost when it is merged into int4. Inside, the adapted weight is
what gets codes, so packing loses nothing (LR-QAT, arXiv 2406.06385, section 3).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from peft.tuners.lora.config import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils import transformers_weight_conversion
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.nn.dtypes import keep_dtype
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.grid import Adapters, Latent


@contextmanager
def targets_by_module() -> Iterator[None]:
    """Keep peft from rewriting targets and adapters of families with experts.

    It would make them targets of transformers' fused parameters, which a prepared model does not have any more: all
    layers of such a name, experts or not, would go without an adapter.
    """
    unchanged = {
        "convert_peft_config_for_transformers": lambda *_, **__: None,
        "convert_peft_adapter_state_dict_for_transformers": lambda *_, adapter_state_dict, **__: adapter_state_dict,
    }
    original = {name: getattr(transformers_weight_conversion, name) for name in unchanged}
    try:
        for name, function in unchanged.items():
            setattr(transformers_weight_conversion, name, function)
        yield
    finally:
        for name, function in original.items():
            setattr(transformers_weight_conversion, name, function)


class LoraFakeQuantLinear(nn.Module, LoraLayer):
    """A `FakeQuantLinear` with adapters inside its quantizer. `lora_A` ``(r, in)`` and `lora_B` ``(out, r)`` are saved
    and loaded by peft like those of any Linear."""

    base_layer: FakeQuantLinear

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
        LoraLayer.__init__(self, base_layer)
        if config.lora_dropout or config.use_dora or config.lora_bias:
            raise LlmqatError(
                "lora_dropout, use_dora and lora_bias have no meaning for an adapter inside the quantizer; leave "
                "them out"
            )
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)  # type: ignore[arg-type]

    def factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        """``A (r, in)`` and ``B (out, r)`` of an adapter."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        assert isinstance(a, Tensor)
        assert isinstance(b, Tensor)
        return a, b

    def adapters(self) -> Adapters | None:
        """The active, unmerged adapters, several laid side by side along r; None if there are none."""
        names = [name for name in self.active_adapters if name in self.lora_A and name not in self.merged_adapters]
        return None if self.disable_adapters or not names else self._side_by_side(names)

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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        return super()._apply(keep_dtype(fn), recurse)  # adapters are float32 masters too

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        """Said here because the rules of peft warn of a layer they do not know."""
        assert isinstance(module, FakeQuantLinear)
        return module.in_features, module.out_features

    def get_delta_weight(self, adapter: str) -> Tensor:
        """``(alpha / r) B A``, ``(out, in)`` float32."""
        a, b = self.factors(adapter)
        delta: Tensor = self.scaling[adapter] * (b.float() @ a.float())
        return delta

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the float master, inside the quantizer, by the forward's operations: codes stay the same."""
        names = check_adapters_to_merge(self, adapter_names)
        for name in names if safe_merge else ():
            if not torch.isfinite(self.get_delta_weight(name)).all():
                raise LlmqatError(f"adapter {name!r} holds non-finite weights; train again with a lower learning rate")
        if names:
            weight = self.base_layer.weight.data
            merged = Latent(weight, None, self._side_by_side(names))
            for rows in merged.chunks():
                weight[rows] = merged.rows(rows)
            self.merged_adapters.extend(names)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take merged adapters out of the master again, up to float32 rounding."""
        while self.merged_adapters:
            self.base_layer.weight.data -= self.get_delta_weight(self.merged_adapters.pop())
