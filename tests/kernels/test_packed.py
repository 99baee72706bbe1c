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
