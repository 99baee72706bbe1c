"""`Packed`: the value of a packed layer, its rows, and what reads it by pointer."""

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.kernels.packed import Packed
from llmqat.scheme import QuantScheme
from tests.kernels.test_ops import packed_layer


@pytest.fixture
def packed(symmetric):
    return Packed(*packed_layer(8, 64, QuantScheme(4, 16, symmetric))[0], torch.randn(8), 4, 64, 8)


def test_the_scheme_is_that_of_the_tensors(packed, symmetric):
    assert packed.scheme == QuantScheme(4, 16, symmetric, act_bits=8)


@pytest.mark.parametrize("field", ["codes", "scale", "bias"])
def test_pointers_are_taken_of_contiguous_tensors_only(packed, field):
    tensor = getattr(packed, field)
    strided = torch.stack([tensor] * 2, dim=-1)[..., 0]
    with pytest.raises(LlmqatError, match=rf"the {field} of a packed layer must lie on the CPU, contiguous; it is on"):
        native.matrix(packed._replace(**{field: strided}))


def test_pointers_are_taken_of_valid_layers_only(packed):
    with pytest.raises(LlmqatError, match=r"weight_packed must be int32, got int8"):
        native.matrix(packed._replace(codes=packed.codes.to(torch.int8)))
    with pytest.raises(LlmqatError, match=r"of a packed layer must lie on the CPU, contiguous; it is on meta"):
        native.matrix(Packed(*(t.to("meta") if torch.is_tensor(t) else t for t in packed)))


@pytest.mark.parametrize("field", ["scale", "bias"])
def test_pointers_are_taken_of_known_dtypes_only(packed, field):
    with pytest.raises(LlmqatError, match=rf"read no {field} of torch.float64; cast it to torch.float32"):
        native.matrix(packed._replace(**{field: getattr(packed, field).double()}))


def test_a_native_layer_checks_its_input(packed):
    with pytest.raises(LlmqatError, match=r"x \(1, 32\) must end in the 64 features"):
        native.Layer(packed).linear(torch.randn(1, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": "codes"}, "weight_packed must be a tensor, got str"),
        ({"bias": [0.0] * 8}, "bias must be a tensor, got list"),
        ({"bits": 4.0}, r"bits must be one of 2, 3, 4, 8, got 4\.0"),
        ({"bits": torch.zeros(2, 3)}, "bits must be one of 2, 3, 4, 8, got tensor"),
        ({"act_bits": 8.0}, r"act_bits must be 8, or None for float activations; got 8\.0"),
        ({"in_features": 64.0}, r"in_features must be the number of weights in a row, got 64\.0"),
        ({"in_features": None}, "in_features must be the number of weights in a row, got None"),
    ],
)
def test_a_field_of_another_kind(packed, changes, message):
    """Beside the operator, whose schema refuses most of these."""
    with pytest.raises(LlmqatError, match=message):
        native.matrix(packed._replace(**changes))


def test_a_native_layer_reads_known_dtypes_only(packed):
    with pytest.raises(LlmqatError, match=r"read no x of torch.float64; cast it to torch.float32"):
        native.Layer(packed).linear(torch.randn(1, 64).double())
    with pytest.raises(LlmqatError, match=r"index must be int64, int32, .* got float32"):
        native.Layer(packed).rows(torch.tensor([0.7]))


def test_the_largest_value_and_the_bandwidth_of_memory_with_gaps():
    """They take a pointer, and read on from there."""
    with pytest.raises(
        LlmqatError, match=r"the values must lie on the CPU, contiguous; it is on cpu with strides \(2,\)"
    ):
        native.argmax(torch.arange(8.0)[::2])
    with pytest.raises(LlmqatError, match=r"read no values of torch.int64"):
        native.argmax(torch.arange(8))
    with pytest.raises(
        LlmqatError, match=r"the data must lie on the CPU, contiguous; it is on cpu with strides \(0,\)"
    ):
        native.read_bandwidth(torch.ones(1).expand(1 << 40))
