"""Coverage: the layers that were and were not quantized."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import floor
from statistics import fmean

from torch import nn

from llmqat.algorithms.blocks import LEAST_TOKENS_PER_INPUT
from llmqat.errors import LlmqatError, shortened_list
from llmqat.scheme import QuantScheme

# Roles of a layer that reports name.
HEAD, TIED_HEAD = "output head", "output head, tied to the embedding"


@dataclass(frozen=True)
class LayerCoverage:
    """One linear layer: its name, shape ``(out, in)``, and the scheme it got, or why it stays float.

    `role`: HEAD for the output head, TIED_HEAD if the input embedding is the same matrix, else empty. `transposed`:
    whether the file has its weight as ``(in, out)``.
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme | None
    reason: str = ""
    role: str = ""
    transposed: bool = False

    @property
    def parameters(self) -> int:
        """Weights of the layer."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CoverageReport:
    """All linear layers of a model, and how much of it they are.

    Attributes:
        layers: every linear layer in model order.
        total_parameters: parameters of the whole model, a tied one counted once.
        block_parameters: those of its blocks; of an unknown family, all but embeddings and the output head.
        uncovered: those of them that belong to no layer that can be quantized, by name: sizes.
        errors: relative output error by layer, ``(rtn, gptq)``, where GPTQ ran; None for GPTQ's where the layer (of an
            expert that was hardly chosen, or of a branch that text does not take) saw too few calibration tokens for it
            and kept round-to-nearest.
        experts_apart: whether transformers knows packed experts of the family; see `reads_experts`.
    """

    layers: tuple[LayerCoverage, ...]
    total_parameters: int
    block_parameters: int = 0
    uncovered: dict[str, int] = field(default_factory=dict)
    errors: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    experts_apart: bool = True

    @property
    def quantized(self) -> list[LayerCoverage]:
        """Layers on the grid."""
        return [layer for layer in self.layers if layer.scheme is not None]

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        """Scheme of each layer on the grid, by name."""
        return {layer.name: layer.scheme for layer in self.layers if layer.scheme is not None}

    @property
    def skipped(self) -> list[LayerCoverage]:
        """Layers that stay float."""
        return [layer for layer in self.layers if layer.scheme is None]

    @property
    def parameters_quantized(self) -> float:
        """Share of all parameters that is on the grid."""
        return sum(layer.parameters for layer in self.quantized) / self.total_parameters

    @property
    def block_coverage(self) -> float:
        """Share of the block parameters in layers that can be quantized, also of those left float by an override."""
        return 1 - sum(self.uncovered.values()) / max(1, self.block_parameters)

    def packed_bits(self, scale_bits: int) -> float:
        """Bits of all packed layers, with scales of so many."""
        return sum(
            layer.parameters * layer.scheme.bits_per_weight(layer.shape[1], scale_bits)
            for layer in self.layers
            if layer.scheme is not None
        )

    @property
    def kept(self) -> list[str]:
        """Layers that GPTQ left as round-to-nearest made them."""
        return [layer for layer, (_, gptq) in self.errors.items() if gptq is None]

    def error_summary(self) -> str:
        """How GPTQ's layer output errors compare with those of round-to-nearest, and what it left alone."""
        ratios = [gptq / rtn for rtn, gptq in self.errors.values() if rtn > 0 and gptq is not None]
        better = sum(ratio < 1 for ratio in ratios)
        lines = []
        if ratios:
            lines.append(
                f"GPTQ: output error {fmean(ratios):.0%} of round-to-nearest's on average, {max(ratios):.0%} at most, "
                f"less in {better} of {len(ratios)} layers"
            )
        if self.kept:
            lines.append(
                f"GPTQ: {len(self.kept)} layers saw fewer than {LEAST_TOKENS_PER_INPUT} calibration tokens "
                f"for each of their inputs and keep round-to-nearest: {shortened_list(self.kept)}; give more with "
                "--calibration-samples"
            )
        return "\n".join(lines)

    def summary(self) -> str:
        """The report in a few lines: schemes with their layers counted, skipped layers with their reasons."""
        lines = [
            f"{len(self.quantized)} layers quantized, {self.parameters_quantized:.1%} of all parameters; layers that "
            f"can be are {self.block_coverage:.1%} of the blocks"
        ]
        schemes = [str(layer.scheme) for layer in self.quantized]
        lines += [f"  {scheme}: {schemes.count(scheme)} layers" for scheme in dict.fromkeys(schemes)]
        heads = [layer for layer in self.quantized if layer.role]
        lines += [f"  of these, {layer.name}: {layer.scheme} ({layer.role})" for layer in heads]
        lines += [f"  float: {name} ({layer.reason})" for name, layer in by_expert(self.skipped)]
        return "\n".join(lines)


def by_expert(layers: Sequence[LayerCoverage]) -> list[tuple[str, LayerCoverage]]:
    """`layers` with their names, those that differ in the number of their expert alone once: ``...experts.*.up_proj``,
    and how many they are."""
    groups: dict[tuple[str, LayerCoverage], list[LayerCoverage]] = {}
    for layer in layers:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", layer.name)
        groups.setdefault((name, replace(layer, name="")), []).append(layer)
    return [
        (f"{name} x {len(group)}" if len(group) > 1 else group[0].name, group[0]) for (name, _), group in groups.items()
    ]


def total_parameters(model: nn.Module) -> int:
    """Parameters of `model`, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def check_coverage(report: CoverageReport, least: float) -> None:
    """The layers that can be quantized must hold at least this share of the block parameters.

    Raises:
        LlmqatError: if they do not, naming the largest others and the remedies.
    """
    if report.block_coverage >= least:
        return
    largest = sorted(report.uncovered.items(), key=lambda item: -item[1])[:3]
    named = ", ".join(f"{name} ({size / 1e6:.3g} M)" for name, size in largest)
    allowed = floor(report.block_coverage * 100) / 100
    raise LlmqatError(
        f"only {report.block_coverage:.1%} of the parameters of the blocks lie in layers that llmqat can quantize, and "
        f"{least:.0%} are asked for; the largest others are {named}. To leave them float all the same, allow it with "
        f"--min-coverage {allowed:g} (Python: min_coverage={allowed:g})"
    )
