"""What was and was not quantized, layer by layer."""

from dataclasses import dataclass, field
from statistics import fmean

from torch import nn

from llmqat.scheme import QuantScheme

# Roles of a layer that reports name.
HEAD, TIED_HEAD = "output head", "output head, tied to the embedding"


@dataclass(frozen=True)
class LayerCoverage:
    """One Linear: its name, shape ``(out, in)``, and the scheme it got, or why it stays float.

    `role`: HEAD for the output head, TIED_HEAD if the input embedding is the same matrix, else empty.
    """

    name: str
    shape: tuple[int, int]
    scheme: QuantScheme | None
    reason: str = ""
    role: str = ""

    @property
    def parameters(self) -> int:
        """Weights of the layer."""
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class CoverageReport:
    """All Linear layers of a model, and how much of it they are.

    Attributes:
        layers: every Linear in model order.
        total_parameters: parameters of the whole model, a tied one counted once.
        errors: relative output error by layer, ``(rtn, gptq)``, where GPTQ ran.
    """

    layers: tuple[LayerCoverage, ...]
    total_parameters: int
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def quantized(self) -> list[LayerCoverage]:
        """Layers on the grid."""
        return [layer for layer in self.layers if layer.scheme is not None]

    @property
    def skipped(self) -> list[LayerCoverage]:
        """Layers that stay float."""
        return [layer for layer in self.layers if layer.scheme is None]

    @property
    def parameters_quantized(self) -> float:
        """Share of all parameters that is on the grid."""
        return sum(layer.parameters for layer in self.quantized) / self.total_parameters

    def error_summary(self) -> str:
        """How GPTQ's layer output errors compare with those of round-to-nearest, in a line."""
        ratios = [gptq / rtn for rtn, gptq in self.errors.values() if rtn > 0]
        better = sum(ratio < 1 for ratio in ratios)
        return (
            f"GPTQ: output error {fmean(ratios):.0%} of round-to-nearest's on average, {max(ratios):.0%} at most, "
            f"less in {better} of {len(ratios)} layers"
        )

    def summary(self) -> str:
        """The report in a few lines: schemes with their layers counted, skipped layers with their reasons."""
        lines = [f"{len(self.quantized)} layers quantized, {self.parameters_quantized:.1%} of all parameters"]
        schemes = [str(layer.scheme) for layer in self.quantized]
        lines += [f"  {scheme}: {schemes.count(scheme)} layers" for scheme in dict.fromkeys(schemes)]
        heads = [layer for layer in self.quantized if layer.role]
        lines += [f"  of these, {layer.name}: {layer.scheme} ({layer.role})" for layer in heads]
        lines += [f"  float: {layer.name} ({layer.reason})" for layer in self.skipped]
        return "\n".join(lines)


def total_parameters(model: nn.Module) -> int:
    """Parameters of `model`, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
