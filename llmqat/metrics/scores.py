"""Losses of tokens, and their distance from the float model's, summed by window."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmqat.kernels import losses
from llmqat.models.output_head import BelowHead, cached


@dataclass
class Scores:
    """Sums over each of the windows that `llmqat.evaluate` has scored.

    Attributes:
        losses: mean cross-entropy, nats.
        targets: tokens scored.
        kl: sum over tokens of ``KL(p_float || p)``, nats.
        agree: tokens whose most likely next token is the float model's.
    """

    losses: list[float] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    agree: list[float] = field(default_factory=list)

    def add(self, batch: Tensor, counts: Tensor | None, below: BelowHead, reference: BelowHead | None) -> None:
        """Score windows of ids ``(windows, window)``, each from its own hidden states; `counts` as in `unstack`."""
        for row, ids in enumerate(batch):
            which = slice(None) if counts is None else counts[row, :-1]
            following, hidden = ids[1:][which], below.hidden[row, :-1][which]
            theirs = None if reference is None else reference.hidden[row, :-1][which]
            found = []
            for chunk in below.chunks(len(hidden)):
                s, ids_of_chunk = below.logits(hidden[chunk]), following[chunk]
                t = None if reference is None or theirs is None else reference.logits(theirs[chunk])
                for few in cached(s):
                    found.append(token_scores(s[few], ids_of_chunk[few], None if t is None else t[few]))
            loss, kl, agree = torch.cat(found, 1).cpu().double().sum(1).tolist()
            self.losses.append(loss / len(hidden))
            self.targets.append(len(hidden))
            self.kl.append(kl)
            self.agree.append(agree)

    def extend(self, others: "Scores") -> None:
        """Append the windows of `others`."""
        for own, more in ((self.losses, others.losses), (self.kl, others.kl), (self.agree, others.agree)):
            own.extend(more)
        self.targets.extend(others.targets)


def token_scores(logits: Tensor, following: Tensor, float_logits: Tensor | None) -> Tensor:
    """Loss, KL from the float model and agreement with it of each token, ``(3, tokens)`` float32.

    With logits ``s``, the float model's ``t``, and ``lse`` the logarithm of the sum of their exponentials, the loss is
    ``lse(s) - s[following]``, and ``KL = sum_v p_v (t_v - s_v) + lse(s) - lse(t)`` where ``p = exp(t - lse(t))``.

    Args:
        logits: ``(tokens, V)``.
        following: ids of the tokens to predict ``(tokens,)``.
        float_logits: of the float model ``(tokens, V)``; without them KL and agreement are 0.
    """
    gpu = losses.on_gpu(*(x for x in (logits, float_logits) if x is not None))
    if gpu is not None:
        scores: Tensor = gpu.token_scores(logits, following, float_logits)
        return scores
    s = logits.float()
    top, first, _, total = softmax_parts(s)
    loss = total.log() + (top - s.gather(-1, following.unsqueeze(-1)).squeeze(-1))
    if float_logits is None:
        return torch.stack([loss, torch.zeros_like(loss), torch.zeros_like(loss)])
    t = float_logits.float()
    float_top, float_first, weights, float_total = softmax_parts(t)
    mean_difference = weights.mul_(t - s).sum(-1) / float_total
    # Differences of the larger terms first: what is left is small, and so is its rounding.
    kl = mean_difference + (top - float_top) + (total.log() - float_total.log())
    return torch.stack([loss, kl, (first == float_first).float()])


def softmax_parts(logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The parts of a softmax of ``(tokens, V)``: the largest logits and their index, ``exp(logits - largest)``, and the
    sums of those."""
    largest, index = logits.max(-1)
    exponentials = (logits - largest.unsqueeze(-1)).exp_()
    return largest, index, exponentials, exponentials.sum(-1)
