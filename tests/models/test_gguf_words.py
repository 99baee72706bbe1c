"""Text is cut into words as a GGUF file says."""

import copy

import pytest

from llmqat.errors import LlmqatError
from llmqat.models.gguf_words import cut_as


def test_words_are_cut_as_the_file_says(merging_tokenizer):
    """And not as transformers does, which knows no digits one by one."""
    merging_tokenizer = copy.deepcopy(merging_tokenizer)
    facts = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    cut_as(merging_tokenizer, facts, "a.gguf")
    words = merging_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1984")
    assert [word for word, _ in words] == ["in", "Ġ", "1", "9", "8", "4"]
    cut_as(merging_tokenizer, facts | {"tokenizer.ggml.pre": "llama-v3"}, "a.gguf")
    words = merging_tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 1984")
    assert [word for word, _ in words] == ["in", "Ġ", "198", "4"]
    assert merging_tokenizer.backend_tokenizer.model.ignore_merges
    with pytest.raises(
        LlmqatError, match=r"a\.gguf says a space before a text, and its tokenizer in transformers does"
    ):
        cut_as(merging_tokenizer, {"tokenizer.ggml.model": "llama"}, "a.gguf")
