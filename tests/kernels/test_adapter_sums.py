"""Sums of adapters: the same bits by torch and by the kernels of every instruction set, whatever rows are asked for."""

import ctypes
import ctypes.util

import pytest
import torch

from llmqat.kernels import adapter_sums, native, training
from llmqat.quant import adapter_sums as in_torch
from tests.kernels.conftest import kernels


@pytest.fixture
def of_isa(isa, monkeypatch):
    """Kernels of one instruction set, where training looks for them."""
    monkeypatch.setattr(training, "library", kernels)


def factors(rows: int, rank: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of many magnitudes, so that each order of sums gives other bits."""
    return torch.randn(rows, rank) * torch.randn(rank).exp(), torch.randn(rank, columns) * torch.randn(columns).exp()


def by_libm(b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """The sums by the fused multiply-add of the C library, entry by entry."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.argtypes, fmaf.restype = [ctypes.c_float] * 3, ctypes.c_float
    sums = torch.zeros(len(b), a.shape[1])
    for i in range(len(b)):
        for j in range(a.shape[1]):
            total = 0.0
            for x, y in zip(b[i].tolist(), a[:, j].tolist(), strict=True):
                total = fmaf(x, y, total)
            sums[i, j] = total
    return sums


@pytest.mark.skipif(not ctypes.util.find_library("m"), reason="no C library to compare with")
def test_torch_adds_fused_from_the_first_rank_to_the_last():
    b, a = factors(7, 9, 11)
    assert torch.equal(in_torch.sum_in_order(b, a), by_libm(b, a))
    assert not torch.equal(in_torch.sum_in_order(b.flip(1), a.flip(0)), by_libm(b, a))  # the order matters here


@pytest.mark.parametrize(("rows", "rank", "columns"), [(1, 1, 1), (8, 4, 32), (37, 16, 96), (65, 5, 131), (3, 33, 31)])
def test_kernels_have_the_bits_of_torch(of_isa, rows, rank, columns):
    b, a = factors(rows, rank, columns)
    assert torch.equal(adapter_sums.sum_in_order(b, a), in_torch.sum_in_order(b, a))


def test_some_rows_are_those_of_the_whole(of_isa, monkeypatch):
    monkeypatch.setattr(in_torch, "CHUNK_ELEMENTS", 3 * 48)
    b, a = factors(29, 8, 48)
    for sums in (adapter_sums.sum_in_order, in_torch.sum_in_order):
        whole = sums(b, a)
        for rows in (slice(0, 1), slice(5, 18), slice(11, 29), torch.tensor([28, 3, 3])):
            assert torch.equal(sums(b[rows], a), whole[rows])


def test_memory_that_is_given_holds_the_sums(of_isa):
    b, a = factors(5, 3, 40)
    memory = torch.full((256,), torch.nan)
    sums = adapter_sums.sum_in_order(b, a, memory)
    assert sums.data_ptr() == memory.data_ptr()
    assert torch.equal(sums, in_torch.sum_in_order(b, a))
    assert memory[200:].isnan().all()


def test_what_is_not_finite_stays_so(of_isa):
    b, a = factors(2, 3, 40)
    b[0, 1], a[2, 5] = torch.nan, torch.inf
    found, expected = adapter_sums.sum_in_order(b, a), in_torch.sum_in_order(b, a)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_matrices_need_not_be_contiguous(of_isa):
    b, a = factors(12, 6, 33)
    found = adapter_sums.sum_in_order(b.T.contiguous().T, a.T.contiguous().T)
    assert torch.equal(found, in_torch.sum_in_order(b, a))


def test_float64_is_left_to_torch():
    b, a = (factor.double() for factor in factors(4, 3, 8))
    found = adapter_sums.sum_in_order(b, a)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, b @ a)


def test_a_rank_of_zero_is_refused():
    if native.library() is None:
        pytest.skip("no compiled kernels")
    with pytest.raises(Exception, match="rank of adapters"):
        adapter_sums.sum_in_order(torch.empty(2, 0), torch.empty(0, 8))
