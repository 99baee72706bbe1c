"""Mixture of experts: transformers' fused 3-D expert weights, split into one Linear per expert and projection.

transformers 5 keeps a layer's experts in two Parameters, in one of a few layouts; most files keep a matrix per expert
and projection. Split like these, an expert is made of Linears like any other, and quantizer, adapters, GPTQ and kernels
need to know nothing of experts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmqat.compat.transformers import by_plain_torch, gate_of
from llmqat.nn.expert_layout import Layout, possible_layouts
from llmqat.quant.grid import lacks_values

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
# Of a trial: experts, width of an expert, and tokens for each or, where tokens choose them, altogether.
TRIAL_EXPERTS, TRIAL_WIDTH, TRIAL_TOKENS = 3, 4, 5
TRIAL_ERROR = 1e-4  # relative: some families compute in float32 whatever they are given, and a wrong layout errs by all

_LAYOUTS: dict[tuple[Any, ...], Layout | None] = {}  # by kind of module, sizes and what is possible


def layout_of(fused: nn.Module) -> Layout | None:
    """How a module holds the weights of experts, tried; None if it does not hold any, or in no way that is known."""
    possible = possible_layouts(fused)
    if not possible:
        return None
    kind = type(fused), tuple(possible), possible[0].sizes_of(dict(fused.named_parameters()))
    if kind not in _LAYOUTS:
        _LAYOUTS[kind] = next((layout for layout in possible if _computes_alike(fused, layout)), None)
    return _LAYOUTS[kind]


@torch.no_grad()
def _computes_alike(fused: nn.Module, layout: Layout) -> bool:
    """Whether `SplitExperts` with this layout computes what a module of the kind does on a few random tokens."""
    sizes = layout.sizes_of(dict(fused.named_parameters()))
    assert sizes is not None
    count, hidden = min(sizes[0], TRIAL_EXPERTS), sizes[1]
    random = torch.Generator("cpu").manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64, device="cpu")

    shapes = layout.shapes(count, hidden, TRIAL_WIDTH)
    trial = by_plain_torch(fused, {name: nn.Parameter(values(*shape)) for name, shape in shapes.items()})
    if layout.sorted:
        arguments = [values(count * TRIAL_TOKENS, hidden)]
        arguments[0][1::2] = 0
    else:
        chosen = torch.rand(TRIAL_TOKENS, count, generator=random, device="cpu").argsort(1)[:, : count - 1 or 1]
        arguments = [values(TRIAL_TOKENS, hidden), chosen, values(*chosen.shape)]
    try:
        right = trial(*(argument.clone() for argument in arguments))
        y = SplitExperts.from_fused(trial, layout)(*arguments)
        return bool((y - right).abs().max() <= TRIAL_ERROR * right.abs().max())
    except Exception:  # a forward that wants something else
        return False


class Expert(nn.Module):
    """``down(act(gate x) * up x)``, or ``down(act(up x))`` where nothing gates.

    Args:
        projections: Linears by the names in `PROJECTIONS`.
        act_fn: of the gate, or of what nothing gates; called with both where it is an `OwnGate`.
    """

    def __init__(self, projections: dict[str, nn.Module], act_fn: Callable[..., Tensor]) -> None:
        super().__init__()
        self.gate_proj, self.act_fn = projections.get("gate_proj"), act_fn
        self.up_proj, self.down_proj = projections["up_proj"], projections["down_proj"]

    def forward(self, x: Tensor) -> Tensor:
        """``(tokens, hidden)`` to ``(tokens, hidden)``."""
        if self.gate_proj is None:
            inner = self.act_fn(self.up_proj(x))
        elif isinstance(self.act_fn, OwnGate):
            inner = self.act_fn(self.gate_proj(x), self.up_proj(x))
        else:
            inner = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        y: Tensor = self.down_proj(inner)
        return y


class OwnGate(nn.Module):
    """A family's own way to put gate and up together, which it is given as its fused experts write them.

    Args:
        fused: experts of the family; only what is not a Parameter of theirs is kept.
        interleaved: see `Layout`.
    """

    def __init__(self, fused: nn.Module, interleaved: bool) -> None:
        super().__init__()
        self.apply_gate, self.interleaved = gate_of(fused), interleaved

    def forward(self, gate: Tensor, up: Tensor) -> Tensor:
        """``(tokens, intermediate)`` each, to one of the same shape."""
        both = torch.stack([gate, up], -1).flatten(-2) if self.interleaved else torch.cat([gate, up], -1)
        y: Tensor = self.apply_gate(both)
        return y


class SplitExperts(nn.ModuleList):
    """The experts of one layer, in place of transformers' fused module and called like it.

    Every expert runs once, on the tokens routed to it. The sum over a token's experts is that of transformers'
    ``grouped_mm`` implementation, operation by operation.

    Attributes:
        layout: of the fused module.
    """

    layout: Layout

    @classmethod
    @torch.no_grad()
    def from_fused(cls, fused: nn.Module, layout: Layout | None = None, copy: bool = True) -> Self:
        """Split the weights of a fused module, whose layout is found if it is not given; the new Parameters are copies
        or views of them. Meta tensors will do."""
        layout = layout or layout_of(fused)
        assert layout is not None
        weights = dict(fused.named_parameters())
        act_fn: Any = OwnGate(fused, layout.interleaved) if layout.own_gate else fused.act_fn
        experts = []
        for index in range(len(weights["down_proj"])):
            apart = layout.apart(weights, index)
            experts.append(Expert({name: _linear(*own, copy) for name, own in apart.items()}, act_fn))
        split = cls(experts).train(fused.training)
        split.layout = layout
        return split

    def forward(self, hidden_states: Tensor, *routes: Tensor) -> Tensor:
        """Run the experts that tokens are routed to.

        Args:
            hidden_states: ``(tokens, hidden)``; by expert, as many tokens to each, where the layout is `sorted`.
            routes: else experts of each token ``(tokens, k)``, and their weights in the sum, of the same shape.
        """
        y, counts = self._of_sorted(hidden_states) if self.layout.sorted else self._of_routed(hidden_states, *routes)
        if not (self.training and torch.is_grad_enabled()):
            return y
        idle = (
            p for expert, n in zip(self, counts, strict=False) if not n for p in expert.parameters() if p.requires_grad
        )
        with_gradients: Tensor = _WithZeroGradients.apply(y, *idle)
        return with_gradients

    def _of_routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> tuple[Tensor, list[int]]:
        """Numbers beyond the experts, which some routers give tokens that skip them all, come last and add nothing."""
        k, chosen = top_k_index.shape[-1], top_k_index.flatten()
        order = chosen.argsort(stable=True)
        counts = _even(len(chosen), len(self)) if lacks_values() else chosen.bincount(minlength=len(self)).tolist()
        *inputs, skipping = hidden_states[order // k].split([*counts[: len(self)], sum(counts[len(self) :])])
        y = self._each(inputs)
        y = torch.cat([y, torch.zeros_like(skipping, dtype=y.dtype)]) if len(skipping) else y
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        return y[order.argsort()].view(-1, k, y.shape[-1]).sum(1).to(hidden_states.dtype), counts

    def _of_sorted(self, hidden_states: Tensor) -> tuple[Tensor, list[int]]:
        """Tokens of zeros are those that an expert was not chosen for, and what it makes of them is zero."""
        chosen = hidden_states.any(-1).nonzero().squeeze(-1)
        of_expert = chosen // (len(hidden_states) // len(self))
        counts = of_expert.bincount(minlength=len(self)).tolist()
        y = self._each(hidden_states[chosen].split(counts))
        return torch.zeros_like(hidden_states, dtype=y.dtype).index_copy(0, chosen, y), counts

    def _each(self, inputs: Sequence[Tensor]) -> Tensor:
        """Outputs of the experts, one below the other, each of its own inputs."""
        outputs = [expert(x) for expert, x in zip(self, inputs, strict=True) if len(x)]
        return torch.cat(outputs or list(inputs))

    def fused(self, weight_of: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
        """Inverse of `from_fused`: the Parameters of the fused module by name, from the weights that `weight_of` gives
        for the layers of the experts."""
        experts: list[Any] = [dict(expert.named_children()) for expert in self]
        names = [name for name in PROJECTIONS if name in experts[0]]
        return self.layout.together(
            [{name: (weight_of(own[name]), own[name].bias) for name in names} for own in experts]
        )


def _even(tokens: int, experts: int) -> list[int]:
    return [tokens // experts + (expert < tokens % experts) for expert in range(experts)]


Routes = list[tuple[Tensor, Tensor]]


@contextmanager
def record_routes(model: nn.Module) -> Iterator[Routes]:
    """Collect expert numbers and weights ``(tokens, k)`` of every `SplitExperts` that runs inside the ``with``; not of
    those that are given tokens by expert."""
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
    experts = [module for module in model.modules() if isinstance(module, SplitExperts) and not module.layout.sorted]
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


def _linear(weight: Tensor, bias: Tensor | None, copy: bool) -> nn.Linear:
    """A Linear on `weight` ``(out, in)`` and `bias`, or on copies of them."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None:
            own = tensor.clone(memory_format=torch.contiguous_format) if copy else tensor
            setattr(linear, name, nn.Parameter(own))
    return linear
