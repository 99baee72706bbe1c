"""Blocks decode, by the code of llama.cpp's own package, to the very numbers that were trained."""

import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as decoded

from llmqat.formats.export.gguf_blocks import BLOCK_TYPES, block_type, to_blocks
from llmqat.quant.affine import dequantize
from llmqat.scheme import BITS, QuantScheme


def grid(scheme, rows=6, length=192):
    """Codes, zero points and scales of either sign that reach the ends of their ranges."""
    codes = torch.randint(scheme.qmin, scheme.qmax + 1, (rows, length))
    codes[:, 0], codes[:, 1] = scheme.qmin, scheme.qmax
    scale = torch.randn(rows, length // scheme.group_length(length)).to(torch.float16)
    zero_point = None if scheme.symmetric else torch.randint(0, scheme.qmax + 1, scale.shape)
    if zero_point is not None:
        zero_point[0], zero_point[1] = 0, scheme.qmax
    return codes.to(torch.int8 if scheme.symmetric else torch.uint8), scale, zero_point


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize(
    ("bits", "symmetric"),
    [(bits, symmetric) for bits in BITS for symmetric in (True, False) if symmetric or bits < 8],  # else no type does
)
def test_a_decoder_of_llama_cpp_gives_the_weights_back(bits, symmetric, group_size):
    scheme = QuantScheme(bits, group_size, symmetric)
    codes, scale, zero_point = grid(scheme)
    kind = block_type(scheme)
    blocks = to_blocks(codes, scale, zero_point, kind)
    assert blocks.shape == (6, 192 // 32 * kind.bytes)
    values = decoded(blocks.numpy(), GGMLQuantizationType[kind.name])
    assert torch.equal(torch.from_numpy(values), dequantize(codes, scale.float(), zero_point, scheme))


@pytest.mark.parametrize(
    ("bits", "symmetric", "name"),
    [(2, True, "Q4_0"), (3, False, "Q4_0"), (4, True, "Q4_0"), (4, False, "Q5_0"), (8, True, "Q8_0")],
)
def test_the_smallest_type_is_taken(bits, symmetric, name):
    assert block_type(QuantScheme(bits, 32, symmetric)).name == name


def test_sizes_are_those_of_the_package():
    from gguf.constants import GGML_QUANT_SIZES

    assert all(GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]] == (32, kind.bytes) for kind in BLOCK_TYPES)
