"""The values that describe a quantized weight: `Grid`, `Latent`, `Adapters` and `Compensation`.

They are NamedTuples of tensors and numbers: functions take them as they are, and only `torch.autograd.Function.apply`
needs them laid flat. Shapes as in `llmqat.quant.affine`: a weight is ``(out, in)``, its scales are ``(out, groups)``.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from llmqat.quant.adapter_sums import sum_in_order
from llmqat.quant.affine import code_values, dequantize, round_scale
from llmqat.quant.row_shards import RowShard
from llmqat.scheme import QuantScheme

# Rows are processed so that a float32 temporary of them (1 MiB) stays in the L2 cache between passes.
CHUNK_ELEMENTS = 1 << 18

# Of a matrix ``(rows, r)`` and one ``(r, in)``.
Product = Callable[[Tensor, Tensor], Tensor]

_without_values = ContextVar("_without_values", default=False)


@contextmanager
def without_values() -> Iterator[None]:
    """Run tensors without values inside the ``with``: of each matrix the first chunk of rows, since all rows cost the
    same; and experts with equal shares of the tokens, since routers have nothing to say."""
    token = _without_values.set(True)
    try:
        yield
    finally:
        _without_values.reset(token)


def lacks_values() -> bool:
    """Whether tensors have no values here: see `without_values`."""
    return _without_values.get()


def slices(total: int, step: int) -> Iterator[slice]:
    """Slices of `step` items, one after the other, over `total`; inside `without_values` the first one."""
    for start in range(0, min(step, total) if lacks_values() else total, step):
        yield slice(start, min(start + step, total))


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices over `rows` of about `CHUNK_ELEMENTS` elements each."""
    return slices(rows, max(1, CHUNK_ELEMENTS // columns))


class Adapters(NamedTuple):
    """LoRA inside the quantizer: ``(scaling * b) @ a`` is added to the weight before it is quantized.

    Attributes:
        a: ``(r, in)``.
        b: ``(out, r)``.
        scaling: ``alpha / r``.
    """

    a: Tensor
    b: Tensor
    scaling: float

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """``scaling * b`` and ``a`` in `dtype`, whose product is added."""
        return self.b.to(dtype) * self.scaling, self.a.to(dtype)


class Compensation(NamedTuple):
    """The change of a weight by GPTQ, a whole number of steps in each entry: ``multiples * step``.

    Attributes:
        multiples: ``(out, in)`` int8, or a wider integer where int8 would cost a code.
        step: ``(out, groups)`` bfloat16.
    """

    multiples: Tensor
    step: Tensor

    def values(self, dtype: torch.dtype) -> Tensor:
        """The change ``(out, in)`` in `dtype`: each entry is one product, rounded once."""
        step = self.step.to(dtype).unsqueeze(-1)
        change: Tensor = self.multiples.to(dtype).unflatten(-1, (step.shape[-2], -1)) * step
        return change.flatten(-2)


class Latent(NamedTuple):
    """The weight that is quantized, as a sum: ``weight + (scaling * b) @ a + compensation``, in this order.

    Attributes:
        weight: the trainable master, ``(out, in)`` float32 (float64 for a float64 model).
        compensation: the change of the weight by GPTQ; None for nothing.
        adapters: LoRA factors; None for none.
        shard: which rows of the matrix `weight` and `compensation` are, where processes divide them; the adapters are
            those of all rows. None for all rows.
    """

    weight: Tensor
    compensation: Compensation | None = None
    adapters: Adapters | None = None
    shard: RowShard | None = None

    def chunks(self) -> Iterator[slice]:
        """Slices over the rows, so that temporaries stay small: see `row_chunks`."""
        return row_chunks(*self.weight.shape)

    @property
    def own_adapters(self) -> Adapters | None:
        """The adapters of the rows that `weight` has."""
        if self.adapters is None or self.shard is None:
            return self.adapters
        return self.adapters._replace(b=self.adapters.b[self.shard.rows])

    def of_rows(self, rows: slice | Tensor) -> "Latent":
        """Some rows of the sum, not yet added up; a slice, or ids ``(n,)``."""
        change, adapters = self.compensation, self.own_adapters
        return Latent(
            self.weight[rows],
            None if change is None else Compensation(change.multiples[rows], change.step[rows]),
            None if adapters is None else adapters._replace(b=adapters.b[rows]),
        )

    def rows(self, rows: slice | Tensor, product: Product = sum_in_order) -> Tensor:
        """Rows of the sum, ``(rows, in)`` in float32 or wider, whatever autocast says; no gradient of adapters.

        Args:
            rows: a slice, or ids ``(n,)``.
            product: of the factors of adapters, by the bits of `sum_in_order`.
        """
        weight, change, adapters, _ = self.of_rows(rows)
        total = weight.to(torch.promote_types(weight.dtype, torch.float32))
        if adapters is not None:
            total = total + product(*adapters.factors(total.dtype))
        if change is not None:  # last: merged adapters then give the same bits
            total = total + change.values(total.dtype)
        return total


class Grid(NamedTuple):
    """The integer grid of one weight: ``W_hat = scale * (codes - zero_point)``.

    Attributes:
        scale: ``(out, groups)``, of either sign; float32 while it trains.
        zero_point: ``(out, groups)``; None for a symmetric scheme.
        code_scale: ``(out, groups)``, finds the codes in place of `scale`, so that training the scale moves no code;
            None where the scale itself finds them.
        scheme: bits, group size, symmetric or not.
        storage_dtype: dtype in which the scale is stored, and ``W_hat`` is computed.
    """

    scale: Tensor
    zero_point: Tensor | None
    code_scale: Tensor | None
    scheme: QuantScheme
    storage_dtype: torch.dtype

    @property
    def scale_of_codes(self) -> Tensor:
        """The scale that finds the codes, ``(out, groups)``."""
        return self.scale if self.code_scale is None else self.code_scale

    def stored(self) -> "Grid":
        """The grid as a file holds it: the scale in the storage dtype, zero points integers of the code range."""
        zero_point = self.zero_point
        if zero_point is not None:
            zero_point = zero_point.round().clamp(self.scheme.qmin, self.scheme.qmax)
        return self._replace(scale=round_scale(self.scale, self.scheme, self.storage_dtype), zero_point=zero_point)

    def widened(self, dtype: torch.dtype) -> "Grid":
        """The `stored` grid with its scales in `dtype`, in which gradients are computed."""
        grid = self.stored()
        code_scale = None if grid.code_scale is None else grid.code_scale.to(dtype)
        return grid._replace(scale=grid.scale.to(dtype), code_scale=code_scale)

    def rows(self, rows: slice | Tensor) -> "Grid":
        """The grid of some rows of the weight."""
        return self._replace(
            scale=self.scale[rows],
            zero_point=None if self.zero_point is None else self.zero_point[rows],
            code_scale=None if self.code_scale is None else self.code_scale[rows],
        )

    def code_values(self, latent: Tensor) -> Tensor:
        """Codes of `latent` ``(rows, in)``, in floating point; the grid is `stored`, and that of these rows."""
        return code_values(latent, self.scale_of_codes, self.zero_point, self.scheme)

    def dequantize(self, codes: Tensor) -> Tensor:
        """``W_hat`` of `codes` ``(rows, in)`` in the storage dtype; the grid is `stored`, and that of these rows."""
        return dequantize(codes, self.scale, self.zero_point, self.scheme)
