"""What a run reads: its dataset, the stream of ids it trains on, and its calibration batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.config import DataConfig, Recipe
from llmqat.data.corpus import Corpus, load_corpus
from llmqat.data.messages import Document
from llmqat.data.named_sets import PUBLISHED_WINDOW, check_options, named_set
from llmqat.data.tokens import blocks, encode
from llmqat.metrics.perplexity import Windows
from llmqat.metrics.published import scored_windows
from llmqat.processes import process_count
from llmqat.progress import say

CALIBRATION_BATCH = 8
# Text is tokenized up to this many tokens, or as many as the run trains on if that is more.
LEAST_TRAIN_TOKENS = 8_000_000
# What `llmqat eval` scores of a dataset without a published protocol.
WINDOW, EVAL_TOKENS, BOS = 512, 65536, "stream"


def read(data: DataConfig, dataset: str) -> Corpus:
    """Documents of a dataset, by the recipe's options; a local or named one beside the main one is not streamed."""
    other = Path(dataset).exists() or named_set(dataset) is not None
    streaming = data.streaming and (dataset == data.dataset or not other)
    return load_corpus(dataset, data.text_field, data.rows, streaming, data.max_rows)


def train_tokens(recipe: Recipe) -> int:
    """How much of the training text is tokenized: enough for the run, and at least `LEAST_TRAIN_TOKENS`."""
    config = recipe.train
    rows = config.max_steps * config.batch_size * config.accumulation * process_count()
    return max(rows * config.length, LEAST_TRAIN_TOKENS)


def training_stream(tokenizer: Any, documents: Sequence[Document], recipe: Recipe) -> Tensor:
    """Training text as one stream of ids."""
    return encode(tokenizer, documents, train_tokens(recipe))


def calibration_batches(stream: Tensor, recipe: Recipe) -> list[Tensor]:
    """Batches ``(batch, length)`` of sequences drawn from a stream of ids, by the seed."""
    rows = blocks(stream, recipe.train.length, "calibration")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))[: recipe.init.samples]
    size = min(CALIBRATION_BATCH, len(order))
    return list(rows[order[: len(order) // size * size]].split(size))


def eval_windows(
    data: DataConfig, tokenizer: Any, context: int | None, window: int | None, max_tokens: int | None, bos: str | None
) -> Windows:
    """The windows that `llmqat eval` scores; of a named set, only what papers score is downloaded.

    Args:
        data: dataset, and how its rows are read.
        tokenizer: of the model.
        context: tokens the model can see; None if it does not say.
        window: None: 512; of a named set what papers take, as far as the context allows.
        max_tokens: None: 65,536; of a named set all that papers score.
        bos: None: once before the stream; of a named set as the tokenizer has it.
    """
    known = named_set(data.dataset)
    if known is None:
        documents = read(data, data.dataset).test
        limits = window or WINDOW, max_tokens or EVAL_TOKENS
        return scored_windows(data.dataset, tokenizer, *limits, bos or BOS, documents)
    check_options(data.dataset, data.streaming, data.rows)
    if window is None and context is not None and context < PUBLISHED_WINDOW:
        say(f"the model's context is {context} tokens: windows are cut to it; papers take {PUBLISHED_WINDOW}")
    window = window or min(PUBLISHED_WINDOW, context or PUBLISHED_WINDOW)
    return scored_windows(data.dataset, tokenizer, window, max_tokens, bos or "tokenizer")
