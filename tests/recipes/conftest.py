"""Tiny random models of the families that recipes are for, and tokenizers for them."""

from collections.abc import Callable
from pathlib import Path

import pytest

# Wide enough for groups of 128; names differ by family.
WIDTHS = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "vocab_size": 258}
OWN_WIDTHS = {"gpt2": {"n_embd": 128, "vocab_size": 258}, "phi3": {k: v for k, v in WIDTHS.items() if k != "head_dim"}}


@pytest.fixture(scope="session")
def family_dir(tiny, tokenizer, tmp_path_factory) -> Callable[[str], Path]:
    """``family_dir("gpt2")``: a directory with a random model of the family and a tokenizer, in float32."""

    def make(model_type: str) -> Path:
        directory = tmp_path_factory.mktemp("families") / model_type
        tiny(model_type, **OWN_WIDTHS.get(model_type, WIDTHS)).save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        return directory

    return make
