"""Trials that find which kernel computes what a module does: small random inputs, through both."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from llmqat.compat.torch import with_modules, with_parameters
from llmqat.kernels import gates, norms, rotary

DTYPES = (torch.float32, torch.bfloat16)
FUNCTIONS = ("act_fn", "activation_fn", "act")  # names of an activation in an MLP
PROJECTIONS = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")
ROUNDING = 2e-5  # relative, of float32 sums in another order
# bfloat16 falls on the other side of a tie now and then: by one unit, in a share of the values.
UNIT, SHARE = 2.0**-7, 0.02
NOTHING = 0.01  # smaller values are compared as if they were so large: torch's gelu loses digits near zero


class Gating(NamedTuple):
    """The form of an MLP: ``down_proj(activation(gate) * up)``.

    Attributes:
        activation: its name in `llmqat.kernels.gates`.
        function: the attribute of the module that computes it.
        halves: gate and up are the two halves of ``gate_up_proj``.
    """

    activation: str
    function: str
    halves: bool


@contextmanager
def _trial() -> Iterator[torch.Generator]:
    """Compute as the trial says, and leave no trace in the random state: what is tried may draw (dropout)."""
    with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
        yield torch.Generator().manual_seed(0)


def _tried(call: Callable[..., Any], *args: Any) -> Any:
    """The result of a call that may not suit what is called; None then."""
    try:
        return call(*args)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return None


def _agree(mine: Tensor, theirs: Any) -> bool:
    """Whether two results are the same to rounding."""
    if not isinstance(theirs, Tensor) or mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    size = theirs.double().abs() + NOTHING
    apart = (mine.double() - theirs.double()).abs()
    return bool((apart <= UNIT * size).all() and (apart > ROUNDING * size).double().mean() < SHARE)


def convention_of(module: nn.Module) -> norms.Convention | None:
    """The convention of an RMSNorm with a weight, or None for what is no such norm."""
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    parameters = dict(module.named_parameters())
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or [*parameters] != ["weight"]:
        return None
    weight = parameters["weight"]
    if weight.device.type != "cpu" or weight.ndim != 1 or not weight.numel() or not _takes_one(module):
        return None
    with _trial() as generator:
        tried = list(_norm_inputs(weight.numel(), eps, generator))
        theirs = [_tried(with_parameters(module, {"weight": w}).forward, x) for x, w in tried]
        for offset, rounds_once in ((0.0, False), (1.0, True), (0.0, True)):
            convention = norms.Convention(eps, offset, rounds_once)
            if all(_agree(norms.rms_norm(*pair, convention), y) for pair, y in zip(tried, theirs, strict=True)):
                return convention
    return None


def _norm_inputs(count: int, eps: float, generator: torch.Generator) -> Iterator[tuple[Tensor, nn.Parameter]]:
    """Rows and weights in all dtypes that meet in training; of some rows `eps` is a good part."""
    x = torch.randn(1024 // count + 3, count, generator=generator)
    x[1::3] *= eps**0.5
    x[2::3] *= 30
    weight = 1 + torch.randn(count, generator=generator)
    for x_dtype, weight_dtype in product(DTYPES, DTYPES):
        yield x.to(x_dtype), nn.Parameter(weight.to(weight_dtype), requires_grad=False)


def _takes_one(module: nn.Module) -> bool:
    """Whether the forward of a module has a single argument."""
    return len(inspect.signature(module.forward).parameters) == 1


def gating_of(module: nn.Module) -> Gating | None:
    """The form of a gated MLP, or None for what is no such module."""
    children = dict(module.named_children())
    projections = [name for name in PROJECTIONS if name in children]
    halves = projections == ["gate_up_proj", "down_proj"]
    function = next((name for name in FUNCTIONS if callable(getattr(module, name, None))), None)
    known = function is not None and (halves or projections == ["gate_proj", "up_proj", "down_proj"])
    # Whatever else is inside may take part: dropout, say.
    if (
        not known
        or children.keys() - {*projections, function}
        or len(inspect.signature(module.forward).parameters) != 1
    ):
        return None
    assert function is not None
    with _trial() as generator:
        activation = _activation_of(getattr(module, function), generator)
        gating = None if activation is None else Gating(activation, function, halves)
        return gating if gating is not None and _has_form(module, gating, generator) else None


def _activation_of(function: Callable[[Tensor], Tensor], generator: torch.Generator) -> str | None:
    x = 4 * torch.randn(2048, generator=generator)
    references: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu_tanh": partial(gelu, approximate="tanh")}
    for name, reference in references.items():
        if all(_agree(reference(x.to(dtype)), _tried(function, x.to(dtype))) for dtype in DTYPES):
            return name
    return None


class _Given(nn.Module):
    """A projection that gives what it was told to, whatever it gets; without, what it gets."""

    def __init__(self, given: Tensor | None = None) -> None:
        super().__init__()
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        return x if self.given is None else self.given


def _has_form(module: nn.Module, gating: Gating, generator: torch.Generator) -> bool:
    """Whether an MLP does nothing but the gate between its projections, which are told here what to give."""
    for dtype in DTYPES:
        gate, up = (torch.randn(2, 16, 64, generator=generator).to(dtype) for _ in range(2))
        given = {"gate_up_proj": torch.cat([gate, up], -1)} if gating.halves else {"gate_proj": gate, "up_proj": up}
        told = {name: _Given(value) for name, value in given.items()}
        other = with_modules(module, {**told, "down_proj": _Given()})
        other.training = True  # where dropout shows
        theirs = _tried(other.forward, torch.zeros_like(gate))
        if not _agree(gates.gated(gate, up, gating.activation), theirs):
            return False
    return True


def rotary_features(function: Callable[..., Any]) -> str:
    """How many features of a head a function of ``(q, k, cosine, sine)`` can turn as the kernels do: ``"all"`` of them,
    or also ``"some"``; ``""`` where it does anything else."""
    with _trial() as generator:
        if not all(_rotates(function, 16, dtypes, generator) for dtypes in product(DTYPES, DTYPES)):
            return ""
        partly = all(_rotates(function, 8, dtypes, generator) for dtypes in product(DTYPES, DTYPES))
        return "some" if partly else "all"


def _rotates(
    function: Callable[..., Any], features: int, dtypes: tuple[torch.dtype, torch.dtype], generator: torch.Generator
) -> bool:
    dtype, table_dtype = dtypes
    q, k = (torch.randn(2, 11, heads, 16, generator=generator).to(dtype).transpose(1, 2) for heads in (3, 1))
    tables = [torch.randn(2, 11, features, generator=generator).to(table_dtype) for _ in range(2)]
    theirs = _tried(function, q, k, *tables)
    pair = isinstance(theirs, tuple) and len(theirs) == 2
    return pair and all(_same(rotary.rotate(x, *tables), y) for x, y in zip((q, k), theirs, strict=True))


def _same(mine: Tensor, theirs: Any) -> bool:
    """Whether a rotation is the same: bit for bit where products are rounded, else to the rounding of float32."""
    if not isinstance(theirs, Tensor) or mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    return torch.equal(mine, theirs) if mine.dtype != torch.float32 else torch.allclose(mine, theirs, atol=1e-5)
