"""How transformers' fused experts hold the weights of each: found by looking, and proven on small ones of the kind.

A module of fused experts has ``down_proj`` and ``gate_up_proj``, or ``up_proj`` where nothing gates, as 3-D Parameters
of its own, and maybe biases. Shapes tell most of the rest, attributes that transformers' decorator sets tell more, and
a trial tells whether all of it is right: a module of the kind with little weights, split, has to compute what it did.
"""

import inspect
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmqat.compat.transformers import has_default_gate

Projections = dict[str, tuple[Tensor, Tensor | None]]


class Layout(NamedTuple):
    """Where the weights of an expert lie in fused Parameters, and how its module is called.

    Attributes:
        gated: the first Parameter holds gate and up, else up alone.
        transposed: matrices lie as ``(in, out)``.
        interleaved: rows of gate and up take turns, else gate lies above up.
        biased: each Parameter has a bias beside it.
        own_gate: the family puts gate and up together in a way of its own, `_apply_gate`.
        sorted: the module is given tokens by expert, as many to each, zeros where it is not chosen; else tokens, and
            the experts that each goes to.
        swapped: peft takes rows for columns, as the module does not say in `is_transposed` that they are.
    """

    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    own_gate: bool
    sorted: bool
    swapped: bool = False

    def __str__(self) -> str:
        words = {
            "without a gate": not self.gated,
            "transposed": self.transposed,
            "interleaved": self.interleaved,
            "with biases": self.biased,
            "with a gate of their own": self.own_gate,
            "given their tokens": self.sorted,
        }
        return ", ".join(word for word, holds in words.items() if holds)

    @property
    def first(self) -> str:
        """Name of the Parameter in front of the activation."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def names(self) -> tuple[str, str]:
        """Names of the Parameters in front of the activation and behind it."""
        return self.first, "down_proj"

    def rows(self, name: str, count: int) -> dict[str, slice]:
        """The projections whose weights lie in the Parameter `name`, and which of its `count` rows are theirs."""
        if name != "gate_up_proj":
            return {name: slice(count)}
        if self.interleaved:
            return {"gate_proj": slice(0, count, 2), "up_proj": slice(1, count, 2)}
        return {"gate_proj": slice(count // 2), "up_proj": slice(count // 2, count)}

    def apart(self, fused: Mapping[str, Tensor], expert: int) -> Projections:
        """Weight ``(out, in)`` and bias of each projection of an expert, as views of the `fused` Parameters."""
        apart: Projections = {}
        for name in self.names:
            weight = fused[name][expert].T if self.transposed else fused[name][expert]
            bias = fused[f"{name}_bias"][expert] if self.biased else None
            for own, rows in self.rows(name, len(weight)).items():
                apart[own] = weight[rows], None if bias is None else bias[rows]
        return apart

    def together(self, apart: list[Projections]) -> dict[str, Tensor]:
        """Inverse of `apart`, for all experts."""
        fused: dict[str, Tensor] = {}
        for name in self.names:
            halves = list(self.rows(name, 0))
            weights = torch.stack([self._joined([own[half][0] for half in halves]) for own in apart])
            fused[name] = (weights.mT if self.transposed else weights).contiguous()
            if self.biased:
                biases = [[own[half][1] for half in halves] for own in apart]
                fused[f"{name}_bias"] = torch.stack([self._joined(own) for own in biases])  # type: ignore[arg-type]
        return fused

    def shapes(self, experts: int, hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the fused Parameters of so many experts, and sizes."""
        wide = intermediate * (2 if self.gated else 1)
        matrices = {self.first: (wide, hidden), "down_proj": (hidden, intermediate)}
        shapes: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in matrices.items():
            shapes[name] = (experts, columns, rows) if self.transposed else (experts, rows, columns)
            if self.biased:
                shapes[f"{name}_bias"] = (experts, rows)
        return shapes

    def sizes_of(self, fused: Mapping[str, Tensor]) -> tuple[int, int, int] | None:
        """Number of experts, hidden and intermediate size of `fused` Parameters; None if their shapes are others."""
        experts, *matrix = fused["down_proj"].shape
        hidden, intermediate = reversed(matrix) if self.transposed else matrix
        expected = self.shapes(experts, hidden, intermediate)
        fits = all(fused[name].shape == shape for name, shape in expected.items())
        return (experts, hidden, intermediate) if fits else None

    def _joined(self, halves: list[Tensor]) -> Tensor:
        return torch.stack(halves, 1).flatten(0, 1) if self.interleaved and len(halves) > 1 else torch.cat(halves)


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the weights of many experts in 3-D Parameters of its own."""
    down = getattr(module, "down_proj", None)
    return isinstance(down, nn.Parameter) and down.ndim == 3


def possible_layouts(fused: nn.Module) -> list[Layout]:
    """The layouts that fit the Parameters of a module, and what transformers says of it; none for other modules."""
    own = dict(fused.named_parameters())
    gated = "gate_up_proj" in own
    own_gate = gated and not has_default_gate(fused)
    names = ("gate_up_proj" if gated else "up_proj", "down_proj")
    biased = f"{names[0]}_bias" in own
    known = {*names, *(f"{name}_bias" for name in names if biased)}
    if own.keys() != known or any(own[name].ndim != 3 for name in names) or not (own_gate or hasattr(fused, "act_fn")):
        return []
    parameters = list(inspect.signature(type(fused).forward).parameters)
    return [
        layout
        for transposed in (False, True)
        for interleaved in ((False, True) if gated else (False,))
        if getattr(fused, "is_transposed", transposed) == transposed
        if getattr(fused, "is_concatenated", not interleaved) != interleaved
        for swapped in [transposed and not hasattr(fused, "is_transposed")]
        for layout in [Layout(gated, transposed, interleaved, biased, own_gate, len(parameters) == 2, swapped)]
        if layout.sizes_of(own) is not None
    ]
