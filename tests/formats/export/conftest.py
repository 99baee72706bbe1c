"""Packed models to export, as small as they can be."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme


@pytest.fixture
def packed_dir(tiny_llama, tmp_path) -> Callable[..., Path]:
    """``packed_dir(scheme, **options)``: a random two-layer Llama on the grid, packed."""

    def make(
        scheme: QuantScheme,
        dtype: torch.dtype = torch.bfloat16,
        model: Any = None,
        tokenizer: Any = None,
        **options: Any,
    ) -> Path:
        model = tiny_llama() if model is None else model
        prepare(model, scheme, storage_dtype=dtype, **options)
        return save_packed(model, tmp_path / f"packed-{len(list(tmp_path.iterdir()))}", tokenizer)

    return make
