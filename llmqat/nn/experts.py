"""Mixture of experts: transformers' fused 3-D expert weights, split into one Linear per expert and projection.

transformers 5 keeps a layer's experts in two Parameters, ``gate_up_proj (experts, 2 * intermediate, hidden)`` and
``down_proj (experts, hidden, intermediate)``; files keep a matrix per expert and projection. Split like the files, an
expert is made of Linears like any other, and quantizer, adapters, GPTQ and kernels need to know nothing of experts.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmqat.compat.transformers import has_default_gate

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# How transformers lays fused experts out unless it says otherwise: gate above up, weights as ``(out, in)``.
LAYOUT = {
    "has_gate": True,
    "has_bias": False,
    "is_transposed": False,
    "is_concatenated": True,
    "has_post_expert_norm": False,
}


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of many experts in 3-D Parameters of its own."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def can_split(module: nn.Module) -> bool:
    """Whether a module is fused, and `SplitExperts` computes the same: its layout and its gate are the usual ones."""
    gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
    if not is_fused(module) or not isinstance(gate_up, nn.Parameter) or not hasattr(module, "act_fn"):
        return False
    assert isinstance(down, nn.Parameter)
    experts, hidden, intermediate = down.shape
    usual = all(getattr(module, name, value) == value for name, value in LAYOUT.items())
    return usual and gate_up.shape == (experts, 2 * intermediate, hidden) and has_default_gate(module)


class Expert(nn.Module):
    """``down(act(gate x) * up x)``."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module, act_fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate, up, down, act_fn

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, hidden)`` to ``(tokens, hidden)``."""
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


class SplitExperts(nn.ModuleList):
    """The experts of one layer, in place of transformers' fused module and called like it.

    Every expert runs once, on the tokens routed to it. The sum over a token's experts is that of transformers'
    ``grouped_mm`` implementation, operation by operation.
    """

    @classmethod
    @torch.no_grad()
    def from_fused(cls, fused: nn.Module, copy: bool = True) -> Self:
        """Split the weights of a fused module; the new Parameters are copies or views of them. Meta tensors will do."""
        gate_up, down = fused.gate_up_proj, fused.down_proj
        act_fn: Any = fused.act_fn
        assert isinstance(gate_up, nn.Parameter)
        assert isinstance(down, nn.Parameter)
        half = gate_up.shape[1] // 2
        experts = (
            Expert(_linear(gate_up[e, :half], copy), _linear(gate_up[e, half:], copy), _linear(down[e], copy), act_fn)
            for e in range(len(down))
        )
        return cls(experts).train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the routed experts.

        Args:
            hidden_states: ``(tokens, hidden)``.
            top_k_index: experts of each token, ``(tokens, k)``.
            top_k_weights: their weights in the sum, ``(tokens, k)``.
        """
        k = top_k_index.shape[-1]
        order = top_k_index.flatten().argsort(stable=True)
        counts = top_k_index.flatten().bincount(minlength=len(self)).tolist()
        inputs = hidden_states[order // k].split(counts)
        y = torch.cat([expert(x) for expert, x in zip(self, inputs, strict=True) if len(x)])
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        y = y[order.argsort()].view(-1, k, y.shape[-1]).sum(1).to(hidden_states.dtype)
        if not (self.training and torch.is_grad_enabled()):
            return y
        idle = (p for e, count in enumerate(counts) if not count for p in self[e].parameters() if p.requires_grad)
        with_gradients: Tensor = _WithZeroGradients.apply(y, *idle)
        return with_gradients


Routes = list[tuple[Tensor, Tensor]]


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Collect expert numbers and weights ``(tokens, k)`` of every `SplitExperts` that runs inside the ``with``."""
    routes: Routes = []
    with _before_experts(model, lambda args: routes.append((args[1], args[2]))):
        yield routes


@contextmanager
def follow_routes(model: nn.Module, routes: Routes) -> Iterator[None]:
    """Send tokens along recorded `routes`, whatever the routers of `model` say.

    A choice between two experts can hang on the last bit: models whose values are compared must not make it each alone.
    """
    following = iter(routes)

    def follow(args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index, weights = next(following)
        return args[0], index, weights.to(args[2].dtype)

    with _before_experts(model, follow):
        yield


@contextmanager
def _before_experts(model: nn.Module, hook: Callable[[tuple[Tensor, ...]], Any]) -> Iterator[None]:
    """Call ``hook(arguments)`` before each run of a `SplitExperts`; what it returns, if anything, takes their place."""
    experts = [module for module in model.modules() if isinstance(module, SplitExperts)]
    handles = [module.register_forward_pre_hook(lambda _, args: hook(args)) for module in experts]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _WithZeroGradients(torch.autograd.Function):
    """Passes `y` through, and gives gradients of zero to `parameters`, those of experts without a token.

    The fused module gives them, too; distributed training waits for a gradient of every parameter.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, *parameters: Tensor) -> Tensor:
        ctx.parameters = parameters
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, ...]:
        return grad_y, *(torch.zeros_like(parameter) for parameter in ctx.parameters)


def _linear(weight: Tensor, copy: bool) -> nn.Linear:
    """A Linear on `weight` ``(out, in)``, or on a copy of it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format) if copy else weight)
    return linear
