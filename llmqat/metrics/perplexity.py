"""Perplexity by the GPTQ protocol, and paired comparison with the float model.

Protocol (IST-DASLab/gptq): documents are joined and tokenized once, the stream is cut into windows that do not
overlap and its tail dropped, each window is scored alone by the mean cross-entropy of its ``window - 1`` shifted
targets in float32, and perplexity is the exponential of the mean over windows. The BOS rule is part of the metric and
recorded with it.

Conversations are scored by their answers only: each is a window of its own, opened as the chat template opens it, and
perplexity is the exponential of the mean cross-entropy over all answer tokens.
"""

import functools
import hashlib
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from llmqat.config import BOS_RULES
from llmqat.data.chat import chat_rows, positions, token_count, unstack
from llmqat.data.messages import Document, is_chat
from llmqat.data.tokens import opened, opening_of
from llmqat.errors import LlmqatError
from llmqat.metrics.forwards import Forwards, ReferenceForwards
from llmqat.metrics.layer_error import LayerErrors
from llmqat.metrics.scores import Scores
from llmqat.models.output_head import Reference
from llmqat.nn.context import check_sequence
from llmqat.progress import track
from llmqat.quant.full_float32 import full_float32
from llmqat.team import ALONE, Team

BATCH_TOKENS = 4096
BOOTSTRAP_SAMPLES = 10_000


@dataclass(frozen=True)
class Windows:
    """The token windows that are scored, and how they came to be.

    Attributes:
        ids: token ids ``(windows, window)``, or ids and labels of conversations ``(rows, 2, longest)``; int64.
        bos: the BOS rule they were cut by, for the record.
        name: of a published protocol, if it is one.
    """

    ids: Tensor
    bos: str
    name: str | None = None

    @property
    def tokens(self) -> int:
        """Tokens in all windows, the padding of conversations left out."""
        return token_count(self.ids)

    @property
    def is_chat(self) -> bool:
        """Whether these are conversations, of which only the answers are scored."""
        return self.ids.ndim == 3

    @property
    def protocol(self) -> str:
        """How they are scored, in words."""
        if self.is_chat:
            return f"{len(self.ids)} conversations, {positions(self.ids)} answer tokens scored"
        if self.name is not None:
            return f"{self.name}, {len(self.ids)} windows of {self.ids.shape[1]}, BOS {self.bos}"
        return f"windows of {self.ids.shape[1]} without overlap, BOS {self.bos}"

    @property
    def sha256(self) -> str:
        """Hash of the ids and labels (int64, little endian): two results compare only if this agrees."""
        return hashlib.sha256(self.ids.contiguous().numpy().astype("<i8").tobytes()).hexdigest()

    def parts(self) -> tuple[Tensor, ...]:
        """The rows of `ids` in batches of about `BATCH_TOKENS` tokens."""
        return self.ids.split(max(1, BATCH_TOKENS // self.ids.shape[-1]))

    def batches(self, description: str, team: Team = ALONE) -> Iterable[tuple[int, Tensor]]:
        """The `parts` in the share of this process, each with its index, under a progress bar."""
        own = team.share(enumerate(self.parts()))
        return track(own, description, len(own))


def windows(
    tokenizer: Any,
    documents: Sequence[Document],
    window: int,
    max_tokens: int | None,
    bos: str = "stream",
    what: str = "evaluation",
    joiner: str = "\n\n",
) -> Windows:
    """Join, tokenize once, cut; conversations stay apart, and are opened by the chat template.

    Args:
        tokenizer: of the model.
        documents: texts to join; or conversations.
        window: tokens per window.
        max_tokens: upper limit of tokens scored; at least one window. None: all.
        bos: "stream": one BOS before everything, if the tokenizer has one; "window": one as the first token of each
            window; "tokenizer": whatever the tokenizer opens a text with, before everything; "none". Conversations have
            that of the template.
        what: names the documents in an error.
        joiner: stands between texts.

    Returns:
        the ids, with the rule they were cut by.

    Raises:
        LlmqatError: if `window` or `bos` is none of these, the text is missing or shorter than one window, no answer
            fits one, or a BOS is asked for and the tokenizer has none.
    """
    if window < 2 or bos not in BOS_RULES:
        raise LlmqatError(
            f"windows have 2 tokens or more, and bos is one of {', '.join(BOS_RULES)}; got window {window}, bos {bos!r}"
        )
    if not documents:
        raise LlmqatError(
            f"there is no {what} text: the dataset has too few rows to hold any out; give it a test split"
        )
    if is_chat(documents):
        return Windows(chat_rows(tokenizer, documents, window, max_tokens, what), "template")
    ids = encode_opened(tokenizer, joiner.join(map(str, documents)), bos)
    stride = window - (bos == "window")
    count = len(ids) // stride
    if max_tokens is not None:
        count = min(count, max(1, max_tokens // window))
    if count == 0:
        raise LlmqatError(
            f"the {what} text has {len(ids)} tokens, fewer than one window of {window}; give more text or a "
            "smaller --window"
        )
    return Windows(with_bos(tokenizer, torch.tensor(ids[: count * stride]).view(count, stride), bos), bos)


def encode_opened(tokenizer: Any, text: str, bos: str) -> list[int]:
    """Ids of a text, opened by the BOS rule of the stream (`windows`)."""
    ids: list[int] = tokenizer(text, add_special_tokens=bos == "tokenizer", verbose=False)["input_ids"]
    return [tokenizer.bos_token_id, *ids] if bos == "stream" and tokenizer.bos_token_id is not None else ids


def with_bos(tokenizer: Any, rows: Tensor, bos: str) -> Tensor:
    """Rows of ids, each opened by a BOS where the rule is "window".

    Raises:
        LlmqatError: if the tokenizer has none.
    """
    return opened(rows, opening_of(tokenizer, bos))


@dataclass(frozen=True)
class Perplexity:
    """Result on some windows.

    Attributes:
        losses: mean cross-entropy of each window, nats, float64 ``(windows,)``.
        kl_to_float: mean over tokens of ``KL(p_float || p)``, nats; None without a reference.
        top1_agreement: share of tokens whose most likely next token is the float model's; None without a reference.
        targets: tokens scored in each window; None where that is the same everywhere.
        layer_errors: relative output error of each watched layer, see `LayerErrors`; None where none was watched.
        also: results on other texts, by their names; None where only one was scored.
    """

    losses: np.ndarray[Any, np.dtype[np.float64]]
    kl_to_float: float | None = None
    top1_agreement: float | None = None
    targets: tuple[int, ...] | None = None
    layer_errors: dict[str, float] | None = None
    also: "dict[str, Perplexity] | None" = None

    @property
    def perplexity(self) -> float:
        """``exp(mean loss)``, the mean over tokens."""
        return float(np.exp(np.average(self.losses, weights=self.targets)))

    def resampled(self, draws: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
        """Perplexity of each row of window indices ``(samples, windows)``."""
        weights = None if self.targets is None else np.asarray(self.targets)[draws]
        return np.exp(np.average(self.losses[draws], axis=1, weights=weights))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    data: Windows,
    reference: Reference | None = None,
    description: str = "perplexity",
    layers: Iterable[str] = (),
) -> Perplexity:
    """Score every window of `data`; with a reference, compare each token's distribution and the output of `layers` too.

    Args:
        model: float, prepared or packed.
        data: from `windows`.
        reference: the float model, as a `FloatCopy` or `FloatView`.
        description: for the progress bar.
        layers: names of layers whose outputs are compared as well.

    Returns:
        losses by window, and from them perplexity; against the reference also KL (nats per token) and top-1 agreement.

    Raises:
        LlmqatError: if the loss is not finite, or a window exceeds the model's tables (`check_sequence`).
    """
    theirs = None if reference is None else ReferenceForwards(reference, layers)
    return compare(model, data, theirs, description, layers)


@torch.no_grad()
def compare(
    model: nn.Module,
    data: Windows,
    theirs: ReferenceForwards | None,
    description: str,
    layers: Iterable[str] = (),
    team: Team = ALONE,
) -> Perplexity:
    """Score every window of `data`, beside the forwards of the float model on them; see `evaluate` and `score`."""
    training = model.training
    model.eval()
    try:
        forwards = Forwards(model, layers)
        if theirs is not None:
            theirs.head.share_cast(forwards.head)
        return score(forwards, data, theirs, description, team)
    finally:
        model.train(training)


@torch.no_grad()
@full_float32()
def score(
    forwards: Forwards,
    data: Windows,
    theirs: ReferenceForwards | None = None,
    description: str = "perplexity",
    team: Team = ALONE,
) -> Perplexity:
    """Score every window of `data` by forwards of a model, which is in evaluation mode; see `evaluate`.

    Each process of `team` scores its share of the batches. What they found is added up in the order of the batches:
    all processes get, to the bit, what one alone would.
    """
    own = [
        _score_batch(forwards, theirs, index, batch.to(forwards.device))
        for index, batch in data.batches(description, team)
    ]
    scores, errors, shares = Scores(), LayerErrors(forwards.layers), team.all_of(own)
    for index in range(len(data.parts())):
        found, found_errors = shares[team.owner(index)][index // team.count]
        scores.extend(found)
        errors.extend(found_errors)
    if not all(map(math.isfinite, scores.losses)):
        raise LlmqatError("the model's loss is not finite; check its weights and dtype")
    n, targets_each = sum(scores.targets), tuple(scores.targets) if data.is_chat else None
    if theirs is None:
        return Perplexity(np.array(scores.losses), targets=targets_each)
    kl, agree = (functools.reduce(operator.add, sums) / n for sums in (scores.kl, scores.agree))
    return Perplexity(np.array(scores.losses), kl, agree, targets_each, errors.result() or None)


def _score_batch(
    forwards: Forwards, theirs: ReferenceForwards | None, index: int, batch: Tensor
) -> tuple[Scores, LayerErrors]:
    scores, errors = Scores(), LayerErrors(forwards.layers)
    ids, counts = unstack(batch)
    check_sequence(forwards.model, ids)
    below, outputs = forwards.of(index, ids)
    float_below, targets = (None, None) if theirs is None else theirs.of(index, ids)
    if targets is not None:
        errors.add(outputs, targets)
    scores.add(ids, counts, below, float_below)
    return scores, errors


def bootstrap_difference(a: Perplexity, b: Perplexity, seed: int = 0) -> tuple[float, float]:
    """95 % interval of ``perplexity(a) - perplexity(b)``: paired bootstrap over windows (percentiles of 10,000
    draws)."""
    generator = np.random.default_rng(seed)
    n = len(a.losses)
    draws = generator.integers(0, n, size=(BOOTSTRAP_SAMPLES, n))
    differences = a.resampled(draws) - b.resampled(draws)
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)
