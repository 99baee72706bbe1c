"""`Packed`: the weights of a layer as the operator, the kernels and the file hold them; and its checks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.quant.packing import from_unsigned, packed_width, unpack_rows
from llmqat.scheme import BITS, QuantScheme

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WORDS = (torch.int32,)
INTEGERS = (int, torch.SymInt)
INDICES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Packed(NamedTuple):
    """A packed layer: the arguments of the operator ``llmqat::packed_linear`` after `x`, in its order.

    Attributes:
        codes: int32 ``(out, ceil(in * bits / 32))``, bit order of `llmqat.quant.packing`.
        scale: ``(out, groups)`` in its storage dtype, in which ``W_hat`` is rounded.
        zero_point: int32 ``(ceil(out * bits / 32), groups)``, packed along `out`; None if symmetric.
        bias: ``(out,)`` or None.
        bits: width of a code.
        in_features: weights per row.
        act_bits: 8 quantizes the input per token first, exactly as in training; None leaves it alone.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bias: Tensor | None
    bits: int
    in_features: int
    act_bits: int | None = None

    @property
    def scheme(self) -> QuantScheme:
        """The grid; groups that are whole rows are given by their length."""
        return QuantScheme(
            bits=self.bits,
            group_size=self.in_features // self.scale.shape[1],
            symmetric=self.zero_point is None,
            act_bits=self.act_bits,
        )

    def unpack(self, rows: slice | Tensor = slice(None)) -> Tensor:
        """Codes of some rows, ``(rows, in)``: int8 for a symmetric scheme, else uint8."""
        return from_unsigned(unpack_rows(self.codes[rows], self.bits, self.in_features), self.scheme)

    def unpack_zero_point(self) -> Tensor | None:
        """Integer zero points, uint8 ``(out, groups)``; None if symmetric."""
        if self.zero_point is None:
            return None
        return unpack_rows(self.zero_point.T.contiguous(), self.bits, self.codes.shape[0]).T.contiguous()


def check_packed(packed: Packed) -> None:
    """Refuse a layer whose tensors and numbers do not describe one weight, before a pointer of them is read.

    Raises:
        LlmqatError: for a width, shape, dtype or device that does not fit the others.
    """
    codes, scale, zero_point, bias, bits, in_features, act_bits = packed
    _check_tensor("weight_packed", codes, WORDS, codes)
    _check_tensor("weight_scale", scale, FLOATS, codes)
    if not _is_one_of(bits, BITS):
        raise LlmqatError(f"bits must be one of {', '.join(map(str, BITS))}, got {bits!r}")
    if act_bits is not None and not _is_one_of(act_bits, (8,)):
        raise LlmqatError(f"act_bits must be 8, or None for float activations; got {act_bits!r}")
    if not isinstance(in_features, INTEGERS):
        raise LlmqatError(f"in_features must be the number of weights in a row, got {in_features!r}")
    if codes.ndim != 2 or scale.ndim != 2 or not codes.numel() or not scale.numel():
        raise LlmqatError(
            f"weight_packed and weight_scale must be matrices that are not empty, got the shapes {_shape(codes)} and "
            f"{_shape(scale)}"
        )
    out, words = codes.shape
    groups, width = scale.shape[1], packed_width(in_features, bits)
    if in_features < 1 or words != width:
        raise LlmqatError(f"{in_features} codes of {bits} bits take {width} words a row, weight_packed has {words}")
    if scale.shape[0] != out or in_features % groups:
        raise LlmqatError(f"weight_scale {_shape(scale)} does not fit a weight of ({out}, {in_features})")
    if zero_point is not None:
        _check_tensor("weight_zero_point", zero_point, WORDS, codes)
        expected = (packed_width(out, bits), groups)
        if zero_point.shape != expected:
            raise LlmqatError(f"weight_zero_point must be packed along the rows: {expected}, got {_shape(zero_point)}")
    if bias is not None:
        _check_tensor("bias", bias, FLOATS, codes)
        if bias.shape != (out,):
            raise LlmqatError(f"bias must have one value for each of the {out} rows, got the shape {_shape(bias)}")


def check_input(x: Tensor, packed: Packed) -> None:
    """Refuse an input that the layer cannot multiply.

    Raises:
        LlmqatError: for a shape, dtype or device that does not fit the layer.
    """
    _check_tensor("x", x, FLOATS, packed.codes)
    if not x.ndim or x.shape[-1] != packed.in_features:
        raise LlmqatError(f"x {_shape(x)} must end in the {packed.in_features} features of the packed weight")


def check_index(index: Tensor, packed: Packed) -> None:
    """Refuse as numbers of rows what is no integers beside the layer.

    Raises:
        LlmqatError: for another dtype or device.
    """
    _check_tensor("index", index, INDICES, packed.codes)


def check_range(index: Tensor, packed: Packed) -> None:
    """Refuse numbers of rows, after `check_index`, that the layer does not have.

    Raises:
        LlmqatError: for a negative number, or one beyond the last row.
    """
    if index.is_meta or not index.numel():
        return
    rows = packed.codes.shape[0]
    low, high = (int(end) for end in index.aminmax())
    if low < 0 or high >= rows:
        raise LlmqatError(
            f"row {low if low < 0 else high} is out of range: the packed matrix has the rows 0 to {rows - 1}; give "
            "token ids of the tokenizer that belongs to the model"
        )


def _check_tensor(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...], codes: Tensor) -> None:
    """Refuse what is no dense tensor of one of `dtypes`, or lies elsewhere than the codes, meta devices included."""
    if not isinstance(tensor, Tensor):
        raise LlmqatError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise LlmqatError(f"{name} must be {known}, got {str(tensor.dtype).removeprefix('torch.')}")
    if tensor.device != codes.device:
        raise LlmqatError(f"{name} is on {tensor.device}, weight_packed on {codes.device}; move them to one device")
    if tensor.layout != torch.strided:
        raise LlmqatError(f"{name} must be dense, got {str(tensor.layout).removeprefix('torch.')}")


def _is_one_of(value: Any, numbers: tuple[int, ...]) -> bool:
    """Whether a value is one of these numbers, and not a float that equals one."""
    return isinstance(value, INTEGERS) and value in numbers


def _shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)
