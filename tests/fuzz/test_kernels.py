"""Random arguments of the operator: the product that float64 gives, or a refusal in one line, and never the end of the
process."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmqat.errors import LlmqatError
from llmqat.kernels import native, ops
from llmqat.kernels.packed import FLOATS, Packed
from llmqat.quant.affine import dequantize, quantize_activation
from llmqat.quant.packing import packed_width
from tests.fuzz.children import in_child

OTHERS = (torch.int32, torch.int8, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)
VALUES = (0.0, -0.0, 1e-45, -1e-30, 1.0, -300.0, 65504.0, 3e38, float("inf"), float("-inf"), float("nan"))
NUMBERS = (None, -1, 0, 1, 3, 5, 8, 16, 1 << 31, (1 << 63) - 1, 1 << 64, 4.0, True, "4", [8])
HUGE = 1 << 45  # rows or tokens of no memory at all
OBJECTS = (None, 1, "x", [1.0], torch.ones(()), torch.ones(0), torch.ones(3, 2))
TENSORS = ("x", "codes", "scale", "zero_point", "bias")
ISAS = native.available()


@dataclass(frozen=True)
class Case:
    """A valid call: sizes, dtypes, and single values put into the input and the scales."""

    out: int
    groups: int
    group: int
    batch: tuple[int, ...]
    bits: int
    symmetric: bool
    bias: torch.dtype | None
    dtype: torch.dtype
    storage_dtype: torch.dtype
    act_bits: int | None
    in_input: tuple[tuple[int, float], ...] = ()
    in_scale: tuple[tuple[int, float], ...] = ()
    strided: tuple[str, ...] = ()
    seed: int = 0


places = st.lists(st.tuples(st.integers(0, 1 << 20), st.sampled_from(VALUES)), max_size=3).map(tuple)
cases = st.builds(
    Case,
    out=st.integers(1, 70),
    groups=st.integers(1, 5),
    group=st.sampled_from([16, 32, 48, 128]) | st.integers(1, 140),
    batch=st.lists(st.integers(0, 9), max_size=3).map(tuple) | st.just((67,)),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    bias=st.sampled_from([None, *FLOATS]),
    dtype=st.sampled_from(FLOATS),
    storage_dtype=st.sampled_from(FLOATS),
    act_bits=st.sampled_from([None, 8]),
    in_input=places,
    in_scale=places,
    strided=st.lists(st.sampled_from(TENSORS), max_size=2).map(tuple),
    seed=st.integers(0, 99),
)


def expanded(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """Its first row, `count` times, in the memory of one."""
    return tensor[:1].expand(count, *tensor.shape[1:])


# Arguments of a wrong kind, or right in another way: what makes one of a valid tensor.
CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    **{f"to {dtype}": partial(torch.Tensor.to, dtype=dtype) for dtype in (*FLOATS, *OTHERS)},
    **{f"expanded to {count}": partial(expanded, count=count) for count in (0, 1, 2, 70, HUGE)},
    **{f"replaced by {value}": lambda _, value=value: value for value in OBJECTS},  # type: ignore[misc]
    "in a batch": lambda tensor: tensor[None],
    "in columns": lambda tensor: tensor[..., None],
    "flat": lambda tensor: tensor.reshape(-1),
    "on meta": lambda tensor: tensor.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "no rows": lambda tensor: tensor[:0],
    "one row": lambda tensor: tensor[:1],
    "a row less": lambda tensor: tensor[:-1],
    "a column less": lambda tensor: tensor[..., :-1],
    "no columns": lambda tensor: tensor[..., :0],
    "transposed": lambda tensor: tensor.transpose(0, -1),
    "upside down": lambda tensor: tensor.flip(0),
    "a parameter": lambda tensor: tensor.detach().requires_grad_(),
}
Wrong = tuple[str, Any]  # the name of an argument, and a name in CHANGES, or a number in its place
wrong_tensors = st.tuples(st.sampled_from(TENSORS), st.sampled_from(sorted(CHANGES)))
wrong_numbers = st.tuples(st.sampled_from(["bits", "in_features", "act_bits"]), st.sampled_from(NUMBERS))
wrongs = st.lists(wrong_tensors | wrong_numbers, min_size=1, max_size=2)


def arguments(case: Case) -> dict[str, Any]:
    """The arguments of the operator, by name."""
    generator = torch.Generator().manual_seed(case.seed)
    in_features = case.groups * case.group

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def words(*shape: int) -> torch.Tensor:
        return torch.randint(-(1 << 31), 1 << 31, shape, generator=generator).int()

    given = {
        "x": with_values(floats(*case.batch, in_features), case.in_input).to(case.dtype),
        "codes": words(case.out, packed_width(in_features, case.bits)),
        "scale": with_values(floats(case.out, case.groups), case.in_scale).to(case.storage_dtype),
        "zero_point": None if case.symmetric else words(packed_width(case.out, case.bits), case.groups),
        "bias": None if case.bias is None else floats(case.out).to(case.bias),
        "bits": case.bits,
        "in_features": in_features,
        "act_bits": case.act_bits,
    }
    return given | {name: strided(given[name]) for name in case.strided if given[name] is not None}


def with_values(tensor: torch.Tensor, values: tuple[tuple[int, float], ...]) -> torch.Tensor:
    """Put single values where the numbers of their places, modulo the size, say."""
    for place, value in values if tensor.numel() else ():
        tensor.view(-1)[place % tensor.numel()] = value
    return tensor


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every other one of a larger piece of memory."""
    room = torch.empty(*tensor.shape, 2, dtype=tensor.dtype)
    room[..., 0] = tensor
    return room[..., 0]


def use(isa: str) -> None:
    library: Any = native.library()
    library.llmqat_use_isa(native.ISAS.index(isa))


def run_operator(x: Any, packed: Packed) -> torch.Tensor:
    """By the schema of torch."""
    return ops.packed_linear(x, packed)


def run_layer(x: Any, packed: Packed) -> torch.Tensor:
    """By the struct that is made once, past the schema."""
    return native.Layer(packed).linear(x)


def assert_product(x: torch.Tensor, packed: Packed, y: torch.Tensor) -> None:
    """The product errs no more than torch does in the same precision."""
    assert y.shape == (*x.shape[:-1], packed.codes.shape[0])
    assert (y.dtype, y.device) == (x.dtype, x.device)
    if y.is_meta:
        return
    finite = x.isfinite().all(-1, keepdim=True) & packed.scale.isfinite().all(-1)
    assert not y.isfinite()[~finite].any(), "what is not finite was lost"
    exact, size, bound = exact_product(x, packed)
    limits = [torch.finfo(dtype).max for dtype in (x.dtype, packed.scale.dtype, torch.float32)]
    judged = finite & (size < min(limits) / 256)
    error = (y.double() - exact).abs()
    assert (error <= bound)[judged].all(), (error - bound)[judged].max()


def exact_product(x: torch.Tensor, packed: Packed) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x @ W_hat.T + bias`` in float64, the sum of the sizes of its terms, and what roundings may cost."""
    w_hat = dequantize(packed.unpack(), packed.scale, packed.unpack_zero_point(), packed.scheme).double()
    x_hat = x.double()
    if packed.act_bits is not None:
        q, scale = quantize_activation(x)
        x_hat = q.double() * scale.double()
    bias = torch.zeros(1).double() if packed.bias is None else packed.bias.double()
    size = x_hat.abs() @ w_hat.abs().T + bias.abs()
    ends = [torch.finfo(dtype) for dtype in (x.dtype, packed.scale.dtype, torch.float32)]
    tiny = max(end.tiny for end in ends)
    lost = tiny * (x_hat.abs().sum(-1, keepdim=True) + w_hat.abs().sum(-1) + 1)
    return x_hat @ w_hat.T + bias, size, 4 * max(end.eps for end in ends) * size + lost


@torch.no_grad()
def check_product(case: Case, isa: str) -> None:
    """A valid call, on one instruction set."""
    use(isa)
    given = arguments(case)
    x, packed = given["x"], Packed(*(given[name] for name in Packed._fields))
    assert_product(x, packed, run_operator(x, packed))


@pytest.mark.parametrize("isa", ISAS)
@given(case=cases)
def test_products_are_those_of_torch(isa, case):
    in_child(check_product, case, isa)


def changed_arguments(case: Case, wrong: list[Wrong]) -> dict[str, Any] | None:
    """The arguments of a case, some of them wrong; None where torch makes no such tensor."""
    given = arguments(case)
    try:
        for name, change in wrong:
            if name not in TENSORS:
                given[name] = change
            elif given[name] is not None:
                given[name] = CHANGES[change](given[name])
    except (RuntimeError, TypeError, AttributeError, IndexError):
        return None
    return given


@torch.no_grad()
def check_wrong(case: Case, wrong: list[Wrong], isa: str, run: Callable[[Any, Packed], torch.Tensor]) -> None:
    """A refusal in one line, or the product."""
    use(isa)
    given = changed_arguments(case, wrong)
    if given is None:
        return
    x, packed = given["x"], Packed(*(given[name] for name in Packed._fields))
    refusal, torch_refusal = "", ""
    try:
        y = run(x, packed)
    except LlmqatError as error:
        refusal = str(error)
    except RuntimeError as error:
        torch_refusal = str(error)
    if torch_refusal:  # of its schema, or its allocator
        assert "Expected a value of type" in torch_refusal or "can't allocate memory" in torch_refusal, torch_refusal
    elif refusal:
        assert "\n" not in refusal
        assert len(refusal) < 1000
    else:
        assert_product(x, packed, y)


@pytest.mark.parametrize("run", [run_operator, run_layer], ids=["operator", "layer"])
@given(case=cases, wrong=wrongs)
def test_arguments_that_do_not_fit(run, case, wrong):
    in_child(check_wrong, replace(case, in_input=(), in_scale=()), wrong, ISAS[-1], run)
