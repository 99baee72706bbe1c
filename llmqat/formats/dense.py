"""Dense copies of a packed model: plain torch on the dequantized weights, which the model is compared with.

They have little memory of their own. Weights are made as they are used, a few rows at a time where a matrix is as large
as an output head; what has the dtype of the copy already is shared with the model.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from llmqat.nn.embedding import PackedEmbedding, is_lookup
from llmqat.nn.packed_linear import PackedLinear, packed_layers
from llmqat.quant.affine import dequantize, fake_quantize_input
from llmqat.quant.grid import slices

MADE_AT_ONCE = 2**26  # weights: half a gigabyte in float64
NUDGE = 2.0**-12  # relative: a code of eight bits is 2^-7 of the largest value


class OnDemand(nn.Module):
    """Matrix ``(out, in)`` whose rows are made as they are used, for a product with all of them or a look-up of some.

    Args:
        shape: of the matrix.
        dtype: to compute in.
    """

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        (self.out_features, self.in_features), self.dtype = shape, dtype

    def rows(self, index: slice | Tensor) -> Tensor:
        """Some rows, ``(rows, in)``."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """All rows."""
        return self.rows(slice(None))

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        parts = list(slices(self.out_features, max(1, MADE_AT_ONCE // self.in_features)))
        if len(parts) == 1:
            return linear(x, self.weight, bias)
        y = x.new_empty(*x.shape[:-1], self.out_features)
        for part in parts:
            y[..., part] = linear(x, self.rows(part), None if bias is None else bias[part])
        return y


class Dequantized(OnDemand):
    """Linear layer on the dequantized weights of a packed one.

    Args:
        packed: whose codes are shared.
        dtype: to compute in.
    """

    def __init__(self, packed: PackedLinear, dtype: torch.dtype) -> None:
        super().__init__((packed.out_features, packed.in_features), dtype)
        # In a tuple, or it would be a part of the model, and be cast and counted with it.
        self.packed = (packed,)
        self.bias = None if packed.bias is None else packed.bias.to(dtype)

    def rows(self, index: slice | Tensor) -> Tensor:
        """Some rows of the dequantized weights, ``(rows, in)``."""
        (layer,) = self.packed
        packed = layer.packed
        zero_point = packed.unpack_zero_point()
        zero_point = None if zero_point is None else zero_point[index]
        return dequantize(packed.unpack(index), packed.scale[index], zero_point, layer.scheme).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        (packed,) = self.packed
        with as_written():
            if packed.scheme.inputs != "float":
                # In float32 always, as the layer does it: x / scale of bfloat16 values often is a tie (63.5 where x is
                # half of absmax), and float64 would break it differently.
                x = fake_quantize_input(x.float(), packed.scheme, packed.input_scale).to(x.dtype)
            return self.product(x, self.bias)


class Widened(OnDemand):
    """Linear layer or look-up on a float matrix of another dtype, which is shared.

    Args:
        matrix: ``(out, in)``.
        bias: of the layer, or None.
        dtype: to compute in.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__((matrix.shape[0], matrix.shape[1]), dtype)
        self.matrix = (matrix.detach(),)  # in a tuple, as in `Dequantized`
        self.bias = None if bias is None else bias.detach().to(dtype)

    def rows(self, index: slice | Tensor) -> Tensor:
        """Some rows in the dtype of the copy."""
        return self.matrix[0][index].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in)`` to ``(..., out)``."""
        return self.product(x, self.bias)


class Lookup(nn.Module):
    """Input embedding on a matrix whose rows are made as they are looked up.

    Args:
        table: the matrix.
        scale: what rows are multiplied by (Gemma), or None.
    """

    def __init__(self, table: OnDemand, scale: Tensor | None) -> None:
        super().__init__()
        self.table: tuple[OnDemand] = (table,)  # a quantized one is the output head, which is counted there
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """All rows."""
        (table,) = self.table
        return table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids of any shape to ``(*ids.shape, in)``."""
        rows: Tensor = self.table[0].rows(ids.flatten()).unflatten(0, ids.shape)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


class InFloat64(TorchFunctionMode):
    """Computes in float64 what a family casts to float32, whatever it is given; but inside `as_written`."""

    paused = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if InFloat64.paused:
            return func(*args, **(kwargs or {}))
        func = Tensor.double if func is Tensor.float else func
        wide = [torch.float64 if value is torch.float32 else value for value in args]
        named = {key: torch.float64 if value is torch.float32 else value for key, value in (kwargs or {}).items()}
        return func(*wide, **named)


@contextmanager
def as_written() -> Iterator[None]:
    """Let functions inside the ``with`` round to float32 as they say, also where `InFloat64` runs."""
    before, InFloat64.paused = InFloat64.paused, True
    try:
        yield
    finally:
        InFloat64.paused = before


def in_float64(forward: Callable[..., Any], ties: bool, *args: Any, **kwargs: Any) -> Any:
    """Run the forward of a model that was cast to float64, all of it.

    What a family rounds to float32 on the way would be rounded alike in the float32 copy, whose error it then hides;
    and would meet weights of float64, which is an error. With `ties`, of inputs that are rounded to int8, only the
    latter counts: rounded alike, they fall on the same side.
    """
    if ties:
        with suppress(RuntimeError):
            return forward(*args, **kwargs)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # of constants
    try:
        with InFloat64():
            return forward(*args, **kwargs)
    finally:
        torch.set_default_dtype(default)


def quantizes_inputs(model: nn.Module) -> bool:
    """Whether a packed layer of `model` rounds its input to int8: rounding ties then fall as chance has it."""
    return any(m.scheme.inputs != "float" for m in packed_layers(model).values())


def dense_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The packed model computed by plain torch on the dequantized weights, in `dtype`.

    Only small float parts are copied: those beside input embedding and output head, if `dtype` is not theirs.
    """
    packed = packed_layers(model)
    memo: dict[int, Any] = {id(module): module for module in packed.values()}
    memo |= {id(parameter): parameter for parameter in model.parameters() if parameter.dtype == dtype}
    instead: dict[int, nn.Module] = {id(layer): Dequantized(layer, dtype) for layer in packed.values()}
    instead |= ends_on_demand(model, instead, dtype)
    memo |= {id(module): module for module in model.modules() if id(module) in instead}
    dense = copy.deepcopy(model, memo)
    for name, module in list(dense.named_modules(remove_duplicate=False)):
        if id(module) in instead:
            dense.set_submodule(name, instead[id(module)])
    dense.to(dtype)  # type: ignore[arg-type]
    if dtype == torch.float64:
        dense.forward = partial(in_float64, dense.forward, quantizes_inputs(model))
    return dense


def ends_on_demand(
    model: PreTrainedModel, layers: Mapping[int, nn.Module], dtype: torch.dtype
) -> Iterator[tuple[int, nn.Module]]:
    """Input embedding and output head of a packed model, where a copy in `dtype` would be one of a large matrix, by
    their ids; with what takes their place.

    Args:
        model: packed.
        layers: what takes the place of packed layers, by their ids.
        dtype: of the copy.
    """
    lookup, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(lookup, PackedEmbedding):
        table = layers[id(head)]
        assert isinstance(table, OnDemand)
        yield id(lookup), Lookup(table, lookup.embed_scale)
    elif is_lookup(lookup) and lookup.weight.dtype != dtype:
        scale = getattr(lookup, "embed_scale", None)
        yield id(lookup), Lookup(Widened(lookup.weight, None, dtype), scale)
    if type(head) is nn.Linear and head.weight.dtype != dtype:
        yield id(head), Widened(head.weight, head.bias, dtype)


@torch.no_grad()
def nudge(plain: PreTrainedModel) -> None:
    """Move the embeddings of a dense copy by less than a code of eight bits; not those that it shares.

    Whether an activation or a cached value lies on a rounding tie is a matter of chance: a bound from a model where it
    happens to move no code says nothing about one where it moves some.
    """
    lookup: Any = plain.get_input_embeddings()
    weight, generator = lookup.weight, torch.Generator().manual_seed(2)
    moved = torch.empty_like(weight)
    # By multiples of 16 numbers, which torch draws together: those of the whole matrix at once.
    for part in slices(len(weight), 16 * max(1, MADE_AT_ONCE // (16 * weight.shape[1]))):
        noise = torch.randn(weight[part].shape, generator=generator)
        moved[part] = weight[part] * (1 + NUDGE * noise.to(weight.device))
    if isinstance(lookup, Lookup):
        lookup.table = (Widened(moved, None, weight.dtype),)
        return
    new = nn.Parameter(moved, requires_grad=False)
    for module in plain.modules():
        if dict(module.named_parameters(recurse=False)).get("weight") is weight:  # a tied head, too
            module.weight = new
