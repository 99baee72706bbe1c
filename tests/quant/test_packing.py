import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from llmqat.quant.packing import from_unsigned, pack_rows, packed_width, to_unsigned, unpack_at, unpack_rows
from llmqat.scheme import QuantScheme

SHAPES = [(83, 545), (1, 1), (3, 31), (5, 32), (2, 33), (7, 64), (4, 11)]


def random_codes(shape, scheme):
    return torch.randint(scheme.qmin, scheme.qmax + 1, shape).to(torch.int8 if scheme.symmetric else torch.uint8)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_compressed_tensors(shape, bits):
    codes = random_codes(shape, QuantScheme(bits))
    packed = pack_rows(to_unsigned(codes, QuantScheme(bits)), bits)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert packed.shape == (shape[0], packed_width(shape[1], bits))
    assert torch.equal(packed, pack_to_int32(codes, bits))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip(shape, scheme):
    codes = random_codes(shape, scheme)
    stored = to_unsigned(codes, scheme)
    assert stored.dtype == torch.uint8
    restored = unpack_rows(pack_rows(stored, scheme.bits), scheme.bits, shape[1])
    assert torch.equal(restored, stored)
    assert from_unsigned(restored, scheme).dtype == codes.dtype
    assert torch.equal(from_unsigned(restored, scheme), codes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacks_single_columns(shape, bits):
    stored = to_unsigned(random_codes(shape, QuantScheme(bits)), QuantScheme(bits))
    index = torch.randint(shape[1], (2 * shape[1],))
    columns = unpack_at(pack_rows(stored, bits), bits, index)
    assert columns.dtype == torch.uint8
    assert torch.equal(columns, stored[:, index])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_unpacks_a_slice_of_rows_and_a_transposed_view(shape, bits):
    stored = to_unsigned(random_codes(shape, QuantScheme(bits)), QuantScheme(bits))
    packed = pack_rows(stored, bits)
    assert torch.equal(unpack_rows(packed[-1:], bits, shape[1]), stored[-1:])
    assert torch.equal(unpack_rows(packed.T.contiguous().T, bits, shape[1]), stored)


def test_the_bit_order_itself():
    row = torch.arange(8, dtype=torch.uint8).unsqueeze(0)
    assert pack_rows(row, 4).tolist() == [[0x76543210]]
    assert pack_rows(row, 8).tolist() == [[0x03020100, 0x07060504]]
    assert pack_rows(row % 4, 2).tolist() == [[0xE4E4]]
    assert pack_rows(row, 3).tolist() == [[sum(i << (3 * i) for i in range(8))]]
    crossing = torch.zeros(1, 11, dtype=torch.uint8)
    crossing[0, 10] = 0b101  # bits 30 to 32: the last one opens the second word
    assert pack_rows(crossing, 3).tolist() == [[1 << 30, 1]]


@pytest.mark.parametrize(
    ("length", "bits", "words"), [(8, 4, 1), (9, 4, 2), (32, 3, 3), (11, 3, 2), (545, 3, 52), (1, 2, 1)]
)
def test_packed_width(length, bits, words):
    assert packed_width(length, bits) == words
