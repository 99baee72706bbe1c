"""From documents to tensors of token ids.

Texts become one stream of ids, cut into sequences of one length; a conversation stays a sequence of its own (see
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

    Raises:
        LlmqatError: if a document is no text that can be tokenized, or no conversation can be used.
    """
    if is_chat(documents):
        return chat_stream(tokenizer, documents, limit)
    ids: list[int] = []
    remaining = iter(documents)
    while batch := list(islice(remaining, DOCUMENTS_AT_ONCE)):
        _check_texts(batch)
        for encoded in tokenizer(batch, verbose=False)["input_ids"]:
            ids.extend(encoded)
        if limit is not None and len(ids) >= limit:
            break
    return torch.tensor(ids[:limit], dtype=torch.long)


def _check_texts(documents: Sequence[Document]) -> None:
    """Refuse half a character, which no tokenizer takes.

    Raises:
        LlmqatError: for a lone surrogate.
    """
    for document in documents:
        try:
            str(document).encode()
        except UnicodeEncodeError as error:
            raise LlmqatError(
                f"a text holds half a character (a lone surrogate, at {error.start}); decode it strictly, or remove it"
            ) from error


def split_stream(stream: Tensor, length: int, what: str = "training", opening: int | None = None) -> Tensor:
    """Cut one stream of ids, such as `llmqat.encode` gives, into sequences of one length; the tail is dropped.

    Args:
        stream: ids ``(tokens,)``.
        length: tokens per sequence.
        what: names the text in an error.
        opening: the id that every sequence begins with, before those of the stream; None for none.

    Returns:
        ``(sequences, length)``, without `opening` a view.

    Raises:
        LlmqatError: if the stream is shorter than one sequence, or no stream; if the length is no number of tokens.
    """
    own = length - (opening is not None)
    if stream.ndim != 1 or own < 1:
        shape = tuple(stream.shape)
        raise LlmqatError(
            f"a stream of ids (tokens,) is cut into sequences of 1 token or more; got shape {shape} and length {length}"
        )
    count = len(stream) // own
    if count == 0:
        raise LlmqatError(
            f"the {what} text has {len(stream)} tokens, fewer than one sequence of {length}; give more text or a "
            "shorter --length or --window"
        )
    return opened(stream[: count * own].view(count, own), opening)


def opened(rows: Tensor, opening: int | None) -> Tensor:
    """Rows of ids ``(rows, tokens)``, each behind an id that opens it; as they are if that is None."""
    return rows if opening is None else torch.cat([rows.new_full((len(rows), 1), opening), rows], 1)


def opening_of(tokenizer: Any, bos: str) -> int | None:
    """The id that opens every sequence by a BOS rule of `llmqat.windows`: that of BOS if it is "window", else None.

    Raises:
        LlmqatError: if the tokenizer has none.
    """
    if bos != "window":
        return None
    if tokenizer.bos_token_id is None:
        raise LlmqatError("--bos window needs a tokenizer with a BOS token; use --bos stream or none")
    return int(tokenizer.bos_token_id)


def sequences(
    tokenizer: Any,
    documents: Sequence[Document],
    length: int,
    limit: int | None = None,
    what: str = "training",
    bos: str = "stream",
) -> Tensor:
    """Training tensors for `llmqat.finetune`: ids ``(sequences, length)`` of texts; of conversations ids and labels
    ``(sequences, 2, length)``, at most as long as the longest.

    Args:
        tokenizer: of the model.
        documents: of one split of a `Corpus`.
        length: tokens per sequence.
        limit: tokenize no more than so many tokens.
        what: names the documents in an error.
        bos: "window" opens every sequence of a text by BOS, which a model may need (Gemma does): see `llmqat.windows`.

    Returns:
        int64; labels are the ids of answers, and -100 elsewhere.

    Raises:
        LlmqatError: if there is less than one sequence, no answer in any, or no BOS where it is asked for.
    """
    if is_chat(documents):
        return chat_rows(tokenizer, documents, length, limit, what)
    return split_stream(encode(tokenizer, documents, limit), length, what, opening_of(tokenizer, bos))


class EndlessSampler(Sampler[list[int]]):
    """Batches of indices of sequences without end: each epoch a new order, all from the seed, from any step on."""

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
