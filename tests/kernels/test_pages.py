"""Huge pages move what a layer reads, and change no value of it."""

import pytest
import torch

from llmqat.kernels import pages


def test_huge_pages_leave_the_values_alone():
    values = [
        torch.arange(n).to(dtype) for n, dtype in ((5, torch.float32), (5 << 20, torch.int32), (7, torch.bfloat16))
    ]
    moved = pages.onto_huge_pages([value.clone()[:, None] for value in values])
    assert all(
        torch.equal(new, old[:, None]) and new.dtype == old.dtype for new, old in zip(moved, values, strict=True)
    )
    assert all(new.data_ptr() % 64 == 0 for new in moved)


def test_no_huge_pages_no_copy(monkeypatch):
    small, large, meta = torch.ones(8), torch.arange(1 << 22), torch.empty(1 << 22, device="meta")
    assert pages.onto_huge_pages([small])[0] is small
    assert pages.onto_huge_pages([meta])[0] is meta
    monkeypatch.setattr(pages, "_gives_huge_pages", lambda: False)
    assert pages.onto_huge_pages([large])[0] is large


@pytest.mark.parametrize("second", [slice(0, None), slice(1 << 20, None), slice(0, 1)], ids=str)
def test_tensors_that_share_memory_stay_where_they_are(second):
    """The pages of the first are given back when it has been copied."""
    shared, expected = torch.arange(4 << 20).int(), torch.arange(4 << 20).int()
    first, part = pages.onto_huge_pages([shared, shared[second]])
    assert torch.equal(first, expected)
    assert torch.equal(part, expected[second])
