"""What a run reads: its dataset, the stream of ids it trains on, and its calibration batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmqat.config import DataConfig, Recipe
from llmqat.processes import process_count
from llmqat.train.corpus import Corpus, load_corpus
from llmqat.train.data import blocks, encode
from llmqat.train.layouts import Document

CALIBRATION_BATCH = 8
# Text is tokenized up to this many tokens, or as many as the run trains on if that is more.
LEAST_TRAIN_TOKENS = 8_000_000


def read(data: DataConfig, dataset: str) -> Corpus:
    """Documents of a dataset, by the recipe's options; a local one is never streamed."""
    streaming = data.streaming and (dataset == data.dataset or not Path(dataset).exists())
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
