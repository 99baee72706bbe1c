"""Conversations to tokens: the tokenizer's chat template, and labels on the answers only.

A row of a batch is one conversation, padded on the right; ``(rows, 2, length)`` holds ids and labels, `IGNORED` where a
token is not an answer's. What ends an answer (the template's end-of-turn token) counts as part of it: a model has to
learn to stop. A causal model's answers do not see the padding, so no attention mask is needed.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from statistics import median
from typing import Any, TypeGuard

import torch
from torch import Tensor

from llmqat.data.layouts import Conversation, Document
from llmqat.data.sources import BadRows
from llmqat.errors import LlmqatError
from llmqat.progress import say

IGNORED = -100  # the label of a token without loss, as in transformers
CONVERSATIONS_AT_ONCE = 64

# For tokenizers without a chat template. Written as text would be, since such a model has no special tokens for turns.
PLAIN_TEMPLATE = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' and eos_token %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\n### Assistant:\n' }}{% endif %}"
)


def is_chat(documents: Sequence[Document]) -> TypeGuard[Sequence[Conversation]]:
    """Whether documents are conversations; none are not."""
    return bool(documents) and not isinstance(documents[0], str)


def ensure_template(tokenizer: Any) -> None:
    """Give a tokenizer without a chat template the plain one, and say so. It is saved with the tokenizer."""
    if not tokenizer.chat_template:
        tokenizer.chat_template = PLAIN_TEMPLATE
        say("the tokenizer has no chat template: using a plain one (### User: ... ### Assistant: ...), saved with it")


def as_question(tokenizer: Any, prompt: str) -> str:
    """A user's message up to where the answer begins, by the chat template."""
    ensure_template(tokenizer)
    message = {"role": "user", "content": prompt}
    text: str = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
    return text


def answer_spans(tokenizer: Any, conversation: Conversation, text: str) -> list[tuple[int, int]]:
    """Where the answers stand in `text`, the rendered conversation: characters ``[start, end)``.

    An answer is what the template adds to the messages before it and the opening of the turn. Where a template rewrites
    earlier turns (drops their reasoning, say), those that stand otherwise in the whole are left out.
    """
    render = partial(tokenizer.apply_chat_template, tokenize=False)
    spans = []
    for index, message in enumerate(conversation):
        if message["role"] != "assistant":
            continue
        closing = text if index == len(conversation) - 1 else render(conversation[: index + 1])
        if not text.startswith(closing):  # some end the whole, not each answer, by the end-of-text token
            closing = closing.removesuffix(tokenizer.eos_token or "")
        opening = render(conversation[:index], add_generation_prompt=True)
        if not text.startswith(opening):  # some open the turn with a tag that a finished answer lacks
            same = next((i for i, (a, b) in enumerate(zip(opening, text, strict=False)) if a != b), 0)
            common = opening[:same]
            opening = common if common.startswith(render(conversation[:index])) else closing
        if text.startswith(closing) and len(opening) < len(closing):
            spans.append((len(opening), len(closing)))
    return spans


class Unused(BadRows):
    """Conversations that were left out, and answers that were: those which the chat template rewrites later on."""

    def __init__(self) -> None:
        super().__init__()
        self.answers = 0


def _rendered(
    tokenizer: Any, conversations: Sequence[Conversation], unused: Unused
) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    for number, conversation in enumerate(conversations, start=1):
        try:
            text = tokenizer.apply_chat_template(conversation, tokenize=False)
            spans = answer_spans(tokenizer, conversation, text)
        except Exception as error:  # templates raise errors of their own: roles must alternate, no system role, ...
            unused.add(f"conversation {number}", f"the chat template refuses it ({' '.join(str(error).split())})")
            continue
        if not spans:
            unused.add(f"conversation {number}", "the chat template shows no answer")
            continue
        unused.answers += sum(message["role"] == "assistant" for message in conversation) - len(spans)
        yield text, spans


def encode_conversations(
    tokenizer: Any, conversations: Sequence[Conversation], unused: Unused
) -> Iterator[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation, `IGNORED` for tokens that do not begin inside an answer.

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
        for ids, offsets, (_, spans) in zip(encoded["input_ids"], encoded["offset_mapping"], batch, strict=True):
            answers = [any(start <= first < end for start, end in spans) for first, _ in offsets]
            yield ids, [token if answer else IGNORED for token, answer in zip(ids, answers, strict=True)]


def chat_stream(tokenizer: Any, conversations: Sequence[Conversation], limit: int | None = None) -> Tensor:
    """All conversations, questions and answers, as one stream of ids; at most `limit`: for calibration."""
    ids: list[int] = []
    for row, _ in encode_conversations(tokenizer, conversations, Unused()):
        ids.extend(row)
        if limit is not None and len(ids) >= limit:
            break
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
    if unused.answers:
        say(f"{what} conversations: {unused.answers} earlier answers do not count, for the chat template rewrites them")
    if longer:
        say(f"{what} conversations: {longer} of {len(rows)} are longer than {length} tokens, and were cut")
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
