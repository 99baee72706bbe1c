"""Documents in, token blocks out.

Texts become one stream of ids, cut into blocks of one length; conversations stay rows of their own (see
`llmqat.data.chat`).
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from llmqat.data.chat import chat_rows, chat_stream
from llmqat.data.messages import Document, is_chat
from llmqat.errors import LlmqatError

DOCUMENTS_AT_ONCE = 64


def encode(tokenizer: Any, documents: Sequence[Document], limit: int | None = None) -> Tensor:
    """All documents as one stream of ids; at most `limit`.

    Each text is opened by whatever the tokenizer opens a text with; conversations go through the chat template.

    Args:
        tokenizer: of the model.
        documents: of one split of a `Corpus`.
        limit: tokens at most; None for all.

    Returns:
        ids, int64 ``(tokens,)``.
    """
    if is_chat(documents):
        return chat_stream(tokenizer, documents, limit)
    ids: list[int] = []
    remaining = iter(documents)
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        for encoded in tokenizer(batch, verbose=False)["input_ids"]:
            ids.extend(encoded)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.long)


def blocks(stream: Tensor, length: int, what: str) -> Tensor:
    """Cut a stream into sequences of one length, dropping the tail.

    Args:
        stream: ids ``(tokens,)``.
        length: tokens per sequence.
        what: names the text in an error.

    Returns:
        a view ``(sequences, length)``.

    Raises:
        LlmqatError: if it is shorter than one block.
    """
    count = len(stream) // length
    if count == 0:
        raise LlmqatError(
            f"the {what} text has {len(stream)} tokens, fewer than one sequence of {length}; give more text or a "
            "shorter "
            "--length or --window"
        )
    return stream[: count * length].view(count, length)


def sequences(
    tokenizer: Any, documents: Sequence[Document], length: int, limit: int | None = None, what: str = "training"
) -> Tensor:
    """What `llmqat.finetune` trains on: ``(blocks, length)`` of texts; of conversations ``(rows, 2, length)``, ids and
    labels, at most as long as the longest.

    Args:
        tokenizer: of the model.
        documents: of one split of a `Corpus`.
        length: tokens per sequence.
        limit: tokenize no more than so many tokens.
        what: names the documents in an error.

    Returns:
        int64; labels are the ids of answers, and -100 elsewhere.

    Raises:
        LlmqatError: if there is less than one sequence, or no answer in any.
    """
    if is_chat(documents):
        return chat_rows(tokenizer, documents, length, limit, what)
    return blocks(encode(tokenizer, documents, limit), length, what)


class EndlessSampler(Sampler[list[int]]):
    """Batches of block indices without end: each epoch a new order, all from the seed, from any step on."""

    def __init__(self, count: int, batch_size: int, seed: int, first_batch: int = 0) -> None:
        self.count, self.batch_size, self.seed, self.first_batch = count, batch_size, seed, first_batch

    def indices(self, position: int) -> Iterator[int]:
        """Indices from overall `position` on."""
        while True:
            epoch, offset = divmod(position, self.count)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            yield from torch.randperm(self.count, generator=generator).tolist()[offset:]
            position = (epoch + 1) * self.count

    def __iter__(self) -> Iterator[list[int]]:
        indices = self.indices(self.first_batch * self.batch_size)
        while True:
            yield list(islice(indices, self.batch_size))
