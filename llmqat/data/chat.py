"""Conversations to tokens: the tokenizer's chat template, and labels on the answers only.

A row of a batch is one conversation, padded on the right; ``(rows, 2, length)`` holds ids and labels, `IGNORED` where a
token is not an answer's. What ends an answer (the template's end-of-turn token) counts as part of it: a model has to
learn to stop. A causal model's answers do not see the padding, so no attention mask is needed.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import islice
from statistics import median
from typing import Any

import torch
from torch import Tensor

from llmqat.data.messages import Conversation, checked, messages_of
from llmqat.data.rows import BadRow, BadRows
from llmqat.data.template import answer_spans, ensure_template, renderer, unused_names
from llmqat.errors import LlmqatError
from llmqat.progress import log

IGNORED = -100  # the label of a token without loss, as in transformers
CONVERSATIONS_AT_ONCE = 64


class Unused(BadRows):
    """Parts left out of conversations, and the conversations of which nothing was left.

    Attributes:
        answers: how many the chat template rewrites later on.
        weights: messages of other roles that ask to be learned.
        names: in how many conversations each key or column stands that the template has no use for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.answers = self.weights = 0
        self.names = Counter[str]()

    def report(self, name: str, good: int) -> None:
        """Log a line for each kind of part that was left out."""
        super().report(name, good)
        if self.answers:
            log(f"{name}: {self.answers} earlier answers do not count, for the chat template rewrites them")
        if self.weights:
            log(f"{name}: {self.weights} messages of other roles have weight 1; only answers are learned")
        if self.names:
            names = ", ".join(f"{name} ({count})" for name, count in sorted(self.names.items()))
            log(f"{name}: the chat template has no use for {names}")


def _conversation(document: Any) -> Conversation:
    """A conversation of a corpus as it is; messages given by hand are brought into its form.

    Raises:
        BadRow: if they are none, or there is no answer to learn.
    """
    return document if isinstance(document, Conversation) else checked(Conversation(messages_of(document, "messages")))


def _rendered(
    tokenizer: Any, conversations: Sequence[Conversation], unused: Unused
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    for number, document in enumerate(conversations, start=1):
        try:
            conversation = _conversation(document)
            yield _text_and_spans(tokenizer, conversation, unused)
        except BadRow as error:
            unused.add(f"conversation {number}", error)


def _text_and_spans(tokenizer: Any, conversation: Conversation, unused: Unused) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and where its answers stand.

    Raises:
        BadRow: if the template refuses it, hides its answers, or has no use for its tool calls.
    """
    try:
        text = renderer(tokenizer, conversation)(conversation)
    except Exception as error:  # templates raise errors of their own: roles must alternate, no system role, ...
        raise BadRow(f"the chat template refuses it ({' '.join(str(error).split())})") from error
    names = unused_names(tokenizer, conversation, text)
    if "tool_calls" in names:
        raise BadRow("the chat template has no use for its tool_calls, which are an answer")
    spans = answer_spans(tokenizer, conversation, text)
    if not spans:
        raise BadRow("the chat template shows no answer")
    learned = sum(message["role"] == "assistant" and message.get("weight", 1) for message in conversation)
    unused.answers += learned - len(spans)
    unused.weights += sum(message["role"] != "assistant" and message.get("weight", 0) for message in conversation)
    unused.names.update(names)
    return text, spans


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], unused: Unused
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation, `IGNORED` for tokens that are not an answer's.

    Raises:
        LlmqatError: if the tokenizer cannot tell where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise LlmqatError(
            f"{type(tokenizer).__name__} cannot tell where in a text its tokens stand, which chat data needs; save it "
            "with a tokenizer.json"
        )
    ensure_template(tokenizer)
    rendered = _rendered(tokenizer, conversations, unused)
    while batch := list(islice(rendered, CONVERSATIONS_AT_ONCE)):
        encoded = tokenizer(
            [text for text, _ in batch], add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        for ids, offsets, (text, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], batch, strict=True):
            answers = [_answers(text, spans, *offset) for offset in offsets]
            yield ids, [token if answer else IGNORED for token, answer in zip(ids, answers, strict=True)]


def _answers(text: str, spans: list[tuple[int, int]], first: int, end: int) -> bool:
    """Whether a token, characters ``[first, end)``, is an answer's: it begins inside one, or in white space before."""
    return any(
        first < stop and (start <= first or (start < end and text[first:start].isspace())) for start, stop in spans
    )


def chat_stream(tokenizer: Any, conversations: Sequence[Conversation], limit: int | None = None) -> Tensor:
    """All conversations, questions and answers, as one stream of ids; at most `limit`: for calibration.

    Raises:
        LlmqatError: if none can be used.
    """
    ids: list[int] = []
    unused = Unused()
    for row, _ in encode_conversations(tokenizer, conversations, unused):
        ids.extend(row)
        if limit is not None and len(ids) >= limit:
            break
    if not ids:
        raise LlmqatError(f"none of {unused.count} conversations can be used; the first one, {unused.first}; mend them")
    return torch.tensor(ids[:limit], dtype=torch.long)


def chat_rows(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    length: int,
    limit: int | None = None,
    what: str = "training",
) -> Tensor:
    """Conversations as rows ``(rows, 2, longest)`` of ids and labels, cut to `length` tokens.

    Args:
        tokenizer: of the model; gets a plain chat template if it has none.
        conversations: lists of messages.
        length: tokens that a row may have.
        limit: stop after so many tokens; one row at least.
        what: names the conversations in what is printed.

    Raises:
        LlmqatError: if no answer is left in any row.
    """
    unused, rows, longer, tokens = Unused(), [], 0, 0
    prompts: list[int] = []
    for number, (ids, labels) in enumerate(encode_conversations(tokenizer, conversations, unused), start=1):
        first = next((position for position, label in enumerate(labels) if position and label != IGNORED), None)
        if first is None:
            unused.add(f"conversation {number}", "no token begins inside its answer")
            continue
        prompts.append(first)
        if first >= length:
            unused.add(f"conversation {number}", f"its first answer begins at token {first + 1}, beyond {length}")
            continue
        longer += len(ids) > length
        rows.append((ids[:length], labels[:length]))
        tokens += len(rows[-1][0])
        if limit is not None and tokens >= limit:
            break
    if not rows:
        prompt = f"; the median prompt has {median(prompts):.0f} tokens" if prompts else ""
        first_reason = f" (the first one, {unused.first})" if unused.first else ""
        raise LlmqatError(
            f"no answer token of the {what} conversations is left within {length} tokens{first_reason}{prompt}; raise "
            "--length or --window, or mend the rows"
        )
    unused.report(f"{what} conversations", len(rows))
    if longer:
        log(f"{what} conversations: {longer} of {len(rows)} are longer than {length} tokens, and were cut")
    return _padded(rows, _padding(tokenizer))


def _padding(tokenizer: Any) -> int:
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(token for token in candidates if token is not None)


def _padded(rows: list[tuple[list[int], list[int]]], padding: int) -> Tensor:
    longest = max(len(ids) for ids, _ in rows)
    result = torch.full((len(rows), 2, longest), IGNORED)
    result[:, 0] = padding
    for row, (ids, labels) in zip(result, rows, strict=True):
        row[0, : len(ids)], row[1, : len(labels)] = torch.tensor(ids), torch.tensor(labels)
    return result


def unstack(batch: Tensor) -> tuple[Tensor, Tensor | None]:
    """Token ids ``(batch, length)``, and the positions that count ``(batch, length)``, or None where all do.

    A position counts if the token after it is an answer's: that is the one it predicts. Rows of conversations are cut
    behind the last answer of the batch, which no loss sees.
    """
    if batch.ndim == 2:
        return batch, None
    counts = torch.zeros_like(batch[:, 1], dtype=torch.bool)
    counts[:, :-1] = batch[:, 1, 1:] != IGNORED
    length = int(counts.any(0).nonzero().max()) + 2 if counts.any() else 1
    return batch[:, 0, :length], counts[:, :length]


def places(counts: Tensor | None) -> Tensor | None:
    """Where the positions that count lie in the flattened batch, ``(tokens,)``; None for all."""
    return None if counts is None else counts.flatten().nonzero().squeeze(-1)


def positions(batch: Tensor) -> int:
    """How many positions of a batch count in its loss."""
    ids, counts = unstack(batch)
    return ids.numel() if counts is None else int(counts.sum())


def token_count(batch: Tensor) -> int:
    """Tokens of a batch, the padding behind the last answer of each row left out."""
    ids, counts = unstack(batch)
    if counts is None:
        return ids.numel()
    ends = counts * torch.arange(2, counts.shape[1] + 2, device=counts.device)
    return int(ends.max(1).values.sum())
