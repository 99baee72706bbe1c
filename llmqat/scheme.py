"""`QuantScheme`: how a weight (and optionally its input) becomes integers. A frozen value, used like a dtype."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from llmqat.errors import LlmqatError

BITS = (2, 3, 4, 8)
SCALE_DTYPES = ("float16",)


@dataclass(frozen=True)
class QuantScheme:
    """One integer grid: ``W_hat = scale * (codes - zero_point)`` with one scale per group of a row.

    Attributes:
        bits: width of a code: 2, 3, 4 or 8.
        group_size: weights of a row that share a scale, counted along `in_features`; -1 is one group per row.
        symmetric: True: codes in ``[-2^(bits-1), 2^(bits-1) - 1]``, no zero point, a scale of either sign.
            False: codes in ``[0, 2^bits - 1]`` and an integer zero point in the same range.
        act_bits: 8 quantizes the layer's input to int8, per token and symmetric, with a scale found at run time;
            None leaves it alone.
        act_static: one scale for all inputs of the layer in place of those, observed beforehand and stored.
        scale_dtype: "float16" trains with scales that are float16 numbers, whatever dtype they are stored in, so that
            formats which store them in it lose nothing; None: any numbers of the storage dtype.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = True
    act_bits: int | None = None
    act_static: bool = False
    scale_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise LlmqatError(f"bits must be one of {', '.join(map(str, BITS))}, got {self.bits}")
        if self.group_size != -1 and self.group_size < 1:
            raise LlmqatError(f"group_size must be positive, or -1 for one group per row; got {self.group_size}")
        if self.act_bits not in (None, 8):
            raise LlmqatError(f"act_bits must be 8, or left out for float activations; got {self.act_bits}")
        if self.act_static and self.act_bits is None:
            raise LlmqatError("act_static is about int8 activations: set act_bits to 8, or leave act_static out")
        if self.scale_dtype not in (None, *SCALE_DTYPES):
            raise LlmqatError(
                f"scale_dtype must be {' or '.join(SCALE_DTYPES)}, or left out for that of the file; got "
                f"{self.scale_dtype!r}"
            )

    @property
    def inputs(self) -> Literal["float", "dynamic", "static"]:
        """How the layer's input is multiplied: as it is, on an int8 grid of each token, or on one grid for all."""
        if self.act_bits is None:
            return "float"
        return "static" if self.act_static else "dynamic"

    @property
    def qmin(self) -> int:
        """Smallest code."""
        return -(1 << (self.bits - 1)) if self.symmetric else 0

    @property
    def qmax(self) -> int:
        """Largest code."""
        return (1 << (self.bits - 1)) - 1 if self.symmetric else (1 << self.bits) - 1

    def divides(self, in_features: int) -> bool:
        """Whether rows of `in_features` weights split into whole groups."""
        return self.group_size == -1 or in_features % self.group_size == 0

    def group_length(self, in_features: int) -> int:
        """Weights per group in a row of `in_features`.

        Raises:
            LlmqatError: if the row does not split into whole groups.
        """
        if not self.divides(in_features):
            raise LlmqatError(
                f"group_size {self.group_size} does not divide in_features {in_features}; choose a divisor of "
                f"{in_features}, or -1 for one group per row"
            )
        return in_features if self.group_size == -1 else self.group_size

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight of one row, scales and zero points included."""
        per_group = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + per_group / self.group_length(in_features)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, in field order."""
        return asdict(self)

    def __str__(self) -> str:
        group = "per channel" if self.group_size == -1 else f"g{self.group_size}"
        acts = "A16" if self.inputs == "float" else f"A{self.act_bits}"
        static = " static activations" if self.inputs == "static" else ""
        scales = f" {self.scale_dtype} scales" if self.scale_dtype else ""
        return f"W{self.bits}{acts} {group} {'symmetric' if self.symmetric else 'asymmetric'}{static}{scales}"
