import dataclasses

import pytest

from llmqat.errors import LlmqatError
from llmqat.scheme import QuantScheme


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 5}, r"bits must be one of 2, 3, 4, 8, got 5"),
        ({"bits": 0}, r"bits must be one of"),
        ({"group_size": 0}, r"group_size must be positive, or -1 .* got 0"),
        ({"group_size": -2}, r"group_size must be positive"),
        ({"act_bits": 4}, r"act_bits must be 8, .* got 4"),
        ({"act_bits": 16}, r"act_bits must be 8"),
        ({"act_static": True}, r"act_static is about int8 activations: set act_bits to 8, or leave act_static out"),
        ({"scale_dtype": "bfloat16"}, r"scale_dtype must be float16, or left out for that of the file; got 'bfloat16'"),
    ],
)
def test_rejects_with_value_and_limit(fields, message):
    with pytest.raises(LlmqatError, match=message):
        QuantScheme(**fields)


@pytest.mark.parametrize(
    ("bits", "symmetric", "limits"),
    [
        (2, True, (-2, 1)),
        (3, True, (-4, 3)),
        (4, True, (-8, 7)),
        (8, True, (-128, 127)),
        (2, False, (0, 3)),
        (3, False, (0, 7)),
        (4, False, (0, 15)),
        (8, False, (0, 255)),
    ],
)
def test_code_range(bits, symmetric, limits):
    scheme = QuantScheme(bits, symmetric=symmetric)
    assert (scheme.qmin, scheme.qmax) == limits


def test_group_length():
    assert QuantScheme(group_size=32).group_length(96) == 32
    assert QuantScheme(group_size=-1).group_length(97) == 97
    assert QuantScheme(group_size=-1).divides(97)
    assert not QuantScheme(group_size=32).divides(97)
    with pytest.raises(LlmqatError, match="group_size 32 does not divide in_features 97; choose a divisor of 97"):
        QuantScheme(group_size=32).group_length(97)


def test_bits_per_weight():
    assert QuantScheme(4, 128).bits_per_weight(4096) == 4 + 16 / 128
    assert QuantScheme(4, 32, symmetric=False).bits_per_weight(64, scale_bits=32) == 4 + 36 / 32
    assert QuantScheme(3, -1).bits_per_weight(80) == 3 + 16 / 80


def test_inputs_are_one_of_three_kinds():
    assert QuantScheme().inputs == "float"
    assert QuantScheme(act_bits=8).inputs == "dynamic"
    assert QuantScheme(act_bits=8, act_static=True).inputs == "static"


def test_is_a_value():
    scheme = QuantScheme(3, 64, False, 8)
    assert scheme == QuantScheme(**scheme.to_dict())
    assert hash(scheme) == hash(QuantScheme(**scheme.to_dict()))
    assert list(scheme.to_dict()) == ["bits", "group_size", "symmetric", "act_bits", "act_static", "scale_dtype"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        scheme.bits = 4


def test_prints_as_people_write_it():
    assert str(QuantScheme()) == "W4A16 g128 symmetric"
    assert str(QuantScheme(3, -1, False, 8)) == "W3A8 per channel asymmetric"
    assert str(QuantScheme(4, 32, scale_dtype="float16")) == "W4A16 g32 symmetric float16 scales"
    assert str(QuantScheme(8, -1, True, 8, True)) == "W8A8 per channel symmetric static activations"


def test_errors_are_value_errors():
    assert issubclass(LlmqatError, ValueError)
