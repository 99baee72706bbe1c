"""Huge pages move what a layer reads, and change no value of it."""

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
