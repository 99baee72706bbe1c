"""Evaluation windows of the datasets known by one word, as papers cut them (`llmqat.data.named_sets`)."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from llmqat.data.corpus import load_corpus
from llmqat.data.messages import Document
from llmqat.data.named_sets import PUBLISHED_WINDOW, named_set
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Windows, encode_opened, windows, with_bos


def scored_windows(
    dataset: str,
    tokenizer: Any,
    window: int = PUBLISHED_WINDOW,
    max_tokens: int | None = None,
    bos: str = "tokenizer",
    documents: Sequence[Document] | None = None,
) -> Windows:
    """The windows to score of a dataset: as papers cut them if it is ``wikitext2``, ``c4``, ``c4-new``, ``ptb`` or
    ``ptb-new``, else as `llmqat.windows` cuts its test split.

    Args:
        dataset: as in `llmqat.load_corpus`.
        tokenizer: of the model.
        window: tokens per window; papers take 2048.
        max_tokens: upper limit of tokens scored; None: all, of C4 256 windows.
        bos: as in `llmqat.windows`; papers leave it to the tokenizer.
        documents: its test split, if that is there already; else it is read, and of a named set nothing else.

    Returns:
        the ids, with the rules they were cut by.

    Raises:
        LlmqatError: if the dataset cannot be had, or its text is too short.
    """
    known, what = named_set(dataset), f"{dataset} evaluation"
    if known is None:
        documents = load_corpus(dataset).test if documents is None else documents
        return windows(tokenizer, documents, window, max_tokens, bos, what)
    if documents is None:
        documents = list(known.texts(known.scored))
    limits = (max_tokens, known.windows and known.windows * window)
    limit = min((n for n in limits if n is not None), default=None)
    texts = [str(document) for document in documents]
    if known.joiner is None:
        assert limit is not None
        found = Windows(crops(tokenizer, texts, window, max(1, limit // window), bos, what), bos)
    else:
        found = windows(tokenizer, texts[: known.documents], window, limit, bos, what, known.joiner)
    return replace(found, name=f"{dataset} as in GPTQ")


def crops(tokenizer: Any, texts: Sequence[str], window: int, count: int, bos: str, what: str) -> Tensor:
    """``(count, window)`` ids, each row cut at random out of a text longer than a window (GPTQ's `get_c4`).

    Seed and order of the draws are those of the paper's code, which fails on a text of exactly `window` tokens; such a
    text is passed over here.

    Raises:
        LlmqatError: if no text is long enough, or a BOS is asked for and the tokenizer has none.
    """
    draw, length = random.Random(0), window - (bos == "window")
    encoded: dict[int, list[int]] = {}
    rows: list[list[int]] = []
    while len(rows) < count:
        index = draw.randint(0, len(texts) - 1)
        if index not in encoded:
            encoded[index] = encode_opened(tokenizer, texts[index], bos)
        ids = encoded[index]
        if len(ids) > length:
            start = draw.randint(0, len(ids) - length - 1)
            rows.append(ids[start : start + length])
        elif len(encoded) == len(texts) and not any(len(other) > length for other in encoded.values()):
            raise LlmqatError(f"no {what} text has more than {length} tokens; give a smaller --window")
    return with_bos(tokenizer, torch.tensor(rows), bos)
