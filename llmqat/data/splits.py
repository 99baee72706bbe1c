"""Which documents are held out: splits that a dataset brings are used, others are cut off its end."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from llmqat.data.folders import split_named
from llmqat.data.messages import Document, is_chat
from llmqat.progress import log

HELD_OUT = 0.05  # share of the documents cut off for validation, and again for test
# Where a long text may be cut, best first.
BORDERS = ("\n\n", "\n", ". ", "。", " ")


@dataclass(frozen=True)
class Corpus:
    """Documents by split: texts, or conversations (lists of messages)."""

    train: list[Document]
    validation: list[Document]
    test: list[Document]

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations."""
        return is_chat(self.train)


def assembled(parts: Mapping[str, list[Document]], name: str) -> Corpus:
    """Train, validation and test as they came; what is missing is cut off the end of the training split.

    A part that is no split by name (``dev``, ``train_sft``, ``test/1.jsonl``) belongs to the split that its name tells,
    and to training if it tells nothing; beside a part called train, only to validation or test. If no name tells of
    training, all parts are cut.
    """
    named = {part: split_named(part) for part in parts}
    if "train" in parts:
        left_out = [part for part, split in named.items() if part != "train" and split in (None, "train")]
        if left_out:
            log(f"{name}: beside train, {', '.join(left_out)} left out")
        named = {part: split for part, split in named.items() if part not in left_out}
    elif "train" not in named.values():
        return hold_out(list(chain.from_iterable(parts.values())))
    splits: dict[str, list[Document]] = {"train": [], "validation": [], "test": []}
    for part, split in named.items():
        if split in parts and part != split:
            continue  # beside a part of just that name
        splits[split or "train"].extend(parts[part])
    if splits["validation"] and splits["test"]:
        return Corpus(**splits)
    rest = hold_out(splits["train"])
    return replace(rest, validation=splits["validation"] or rest.validation, test=splits["test"] or rest.test)


def hold_out(documents: list[Document]) -> Corpus:
    """Cut validation and test off the end.

    Conversations are put into the order of their hashes before, which depends on nothing but themselves. Of texts,
    whole documents are cut off where there are enough; else characters are counted, and a long text is cut in two.
    """
    if is_chat(documents):
        return Corpus(*_cut_documents(sorted(documents, key=_hash)))
    if len(documents) >= 2 / HELD_OUT:
        parts = _cut_documents(documents)
        sizes = [sum(map(len, part)) for part in parts]
        if min(sizes) >= HELD_OUT / 2 * sum(sizes):
            return Corpus(*parts)
    return Corpus(*map(list[Document], _cut_characters(list(map(str, documents)))))


def _cut_documents(documents: list[Document]) -> tuple[list[Document], list[Document], list[Document]]:
    held_out = max(1, int(len(documents) * HELD_OUT)) if len(documents) > 2 else 0
    end = len(documents) - 2 * held_out
    return documents[:end], documents[end : end + held_out], documents[end + held_out :]


def _cut_characters(texts: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Three parts of texts; the last two have `HELD_OUT` of the characters each, about, and end where a text does."""
    total = sum(map(len, texts))
    size = max(1, int(total * HELD_OUT)) if total > 2 else 0
    first, rest = _cut_at(texts, total - 2 * size, size // 2)
    return first, *_cut_at(rest, sum(map(len, rest)) - size, size // 2)


def _cut_at(texts: Sequence[str], position: int, slack: int) -> tuple[list[str], list[str]]:
    """Texts before and behind a position in all of them, moved by up to `slack` characters to the border of a text."""
    slack = min(slack, position - 1, sum(map(len, texts)) - position - 1)  # neither side is left without a character
    index, start = 0, 0
    while index < len(texts) and start + len(texts[index]) <= position:
        start += len(texts[index])
        index += 1
    if index == len(texts) or (index and position - start <= slack):
        return list(texts[:index]), list(texts[index:])
    if index + 1 < len(texts) and start + len(texts[index]) - position <= slack:
        return list(texts[: index + 1]), list(texts[index + 1 :])
    border = _border(texts[index], position - start, slack)
    before, behind = texts[index][:border], texts[index][border:]
    return [*texts[:index], *filter(None, [before])], [*filter(None, [behind]), *texts[index + 1 :]]


def _border(text: str, position: int, slack: int) -> int:
    """The nearest end of a paragraph, else of a line, a sentence or a word, to a position; else the position."""
    low, high = max(0, position - slack), min(len(text), position + slack)
    for border in BORDERS:
        before = text.rfind(border, low, position)
        behind = text.find(border, position, high)
        found = [at + len(border) for at in (before, behind) if at >= 0 and 0 < at + len(border) < len(text)]
        if found:
            return min(found, key=lambda at: abs(at - position))
    return position


def _hash(document: Document) -> str:
    arguments = getattr(document, "template_arguments", None)
    content = [document, arguments] if arguments else document
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
