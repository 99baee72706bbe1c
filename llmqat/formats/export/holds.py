"""The grids that each format holds without loss, in one table."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llmqat.scheme import BITS, QuantScheme


@dataclass(frozen=True)
class Holds:
    """The grids that a format holds without loss.

    Attributes:
        symmetric: widths of symmetric grids, whose scales may have either sign.
        asymmetric: widths of asymmetric ones.
        rounded: widths of asymmetric ones that are held but for a rounding: of their minimum, scale times zero point.
        groups: group sizes, or lengths of rows that are one group; None for any.
        whole_rows: whether a row of any length may be one group.
        multiple: whether multiples of these are held too, by repeating a scale.
        scale_dtype: dtype of the scales in the file; None for that of the packed model.
        head: whether the output head may be on a grid.
        tied_head: whether it may share its codes with the embedding.
        transposed: whether layers may keep their weight as ``(in, out)``, as GPT-2's do.
        mixed: whether layers may have several grids.
        float_layers: whether linear layers of the blocks may be on none.
        rows: what the number of rows of a weight has to be a multiple of.
        fused: whether layers that are run as one (q, k and v; gate and up) have to have one grid.
        inputs: how its engines run layers that were trained on such inputs, see `QuantScheme.inputs`.
        kv_bits: widths of a quantized cache that they run as it was trained.
    """

    symmetric: tuple[int, ...] = BITS
    asymmetric: tuple[int, ...] = BITS
    rounded: tuple[int, ...] = ()
    groups: tuple[int, ...] | None = None
    whole_rows: bool = False
    multiple: bool = False
    scale_dtype: str | None = None
    head: bool = True
    tied_head: bool = True
    transposed: bool = False
    mixed: bool = True
    float_layers: bool = True
    rows: int = 1
    fused: bool = False
    inputs: tuple[str, ...] = ("float",)
    kv_bits: tuple[int, ...] = ()

    def bits(self, symmetric: bool) -> tuple[int, ...]:
        """Widths of one kind of grid."""
        return self.symmetric if symmetric else self.asymmetric

    def holds_group(self, length: int, row: int) -> bool:
        """Whether groups of `length` weights are held, of rows of `row`."""
        if self.groups is None or length in self.groups or (self.whole_rows and length == row):
            return True
        return self.multiple and any(length % group == 0 for group in self.groups)


def nearest(rows: Sequence[Holds], scheme: QuantScheme, in_features: int) -> str:
    """The grid nearest to `scheme` that all of some formats hold, as what to do instead."""
    symmetry = scheme.symmetric, not scheme.symmetric
    grids = [(bits, own) for own in symmetry for bits in BITS if all(bits in row.bits(own) for row in rows)]
    if not grids:
        return "no grid is held by all of them: serve with fewer"
    bits, symmetric = min(
        grids,
        key=lambda grid: (grid[0] != scheme.bits, grid[1] != scheme.symmetric, abs(grid[0] - scheme.bits), grid[0]),
    )
    scheme, wanted = replace(scheme, bits=bits, symmetric=symmetric), scheme.group_length(in_features)
    if not all(row.holds_group(wanted, in_features) for row in rows):
        sizes = {size for row in rows for size in row.groups or () if in_features % size == 0}
        held = [size for size in sizes if all(row.holds_group(size, in_features) for row in rows)]
        if not held:
            return f"rows of {in_features} have no group size that is held: keep the layer float with an override"
        scheme = replace(scheme, group_size=min(held, key=lambda size: (abs(size - wanted), size)))
    asym = "" if scheme.symmetric else " --asym"
    return f"train with --bits {scheme.bits} --group-size {scheme.group_size}{asym}"


PACKED = "packed"  # the packed directory itself, beside the formats that it is exported to

BYTES = 2, 4, 8  # widths that fill a byte
# llama.cpp rounds inputs to int8 whatever they were in training, ONNX Runtime where a graph says so; both by blocks.
INT8_INPUTS = "float", "dynamic"
# Formats of `llmqat export`: the columns of docs/serve.md's table.
HOLDS = {
    "dense": Holds(transposed=True),
    "gguf": Holds(asymmetric=(2, 3, 4), groups=(32,), multiple=True, scale_dtype="float16", inputs=INT8_INPUTS),
    "gptq": Holds(scale_dtype="float16", head=False, mixed=False, float_layers=False, rows=32),
    "awq": Holds((4,), (4,), scale_dtype="float16", head=False, mixed=False, rows=8),
    "mlx": Holds(asymmetric=(), rounded=BITS, groups=(32, 64, 128)),
    "onnx": Holds(
        BYTES,
        BYTES,
        groups=(16, 32, 64, 128, 256),
        head=False,
        mixed=False,
        float_layers=False,
        rows=32,
        inputs=INT8_INPUTS,
    ),
}
# Engines that run the packed directory, and hold less than it does: vLLM, by its kernels for CPUs, which were run, and
# those for GPUs, which were read.
VLLM = Holds((4, 8), (4,), groups=(32, 64, 128), whole_rows=True, head=False, fused=True)
RUN_PACKED = {"vllm": VLLM, "vllm-cpu": replace(VLLM, symmetric=(4,))}
