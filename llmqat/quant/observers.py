"""Observers: find the range of a static activation grid from the batches that pass, one after the other.

| kind | range | source |
|---|---|---|
| ``minmax`` | the largest magnitude seen | |
| ``moving_average`` | moving average of each batch's largest magnitude | Jacob et al., 1712.05877, section 3.1 |
| ``percentile`` | what `PERCENTILE` of all magnitudes lie below | Wu et al., arXiv 2004.09602, section 5 |
| ``mse`` | the range of least squared error, over a histogram of magnitudes | the same; clipped values count too |

The state of an observer is one float64 tensor, so that it travels with a checkpoint: ``(1,)`` for the first two,
``(1 + BINS,)`` for the others: the upper end of the histogram, then its counts. A state of zeros has seen nothing.
"""

import torch
from torch import Tensor

from llmqat.config import OBSERVERS
from llmqat.errors import LlmqatError
from llmqat.quant.affine import quotient

MOMENTUM = 0.99
PERCENTILE = 0.9999
BINS = 2048
# Candidate ranges of `mse`, as shares of the largest magnitude.
SHRINKS = tuple(step / 64 for step in range(8, 65))


def check_observer(kind: str) -> None:
    """Refuse names that no observer has.

    Raises:
        LlmqatError: if there is no such observer.
    """
    if kind not in OBSERVERS:
        raise LlmqatError(f"no observer {kind!r}; choose one of {', '.join(OBSERVERS)}")


def initial_state(kind: str) -> Tensor:
    """The state of an observer that has seen nothing.

    Raises:
        LlmqatError: if there is no such observer.
    """
    check_observer(kind)
    return torch.zeros(1 if kind in OBSERVERS[:2] else 1 + BINS, dtype=torch.float64)


@torch.no_grad()
def observe(kind: str, state: Tensor, x: Tensor, layer: str = "a layer") -> Tensor:
    """The state after a batch `x` of any shape; an expert may get an empty one. `layer` is named in messages.

    Raises:
        LlmqatError: if `x` holds NaN or infinity.
    """
    if not x.numel():
        return state
    magnitudes = x.detach().abs().flatten()
    largest = magnitudes.amax().to(torch.float64)
    if not torch.isfinite(largest):
        raise LlmqatError(
            f"the inputs of {layer} with static activations hold NaN or infinity; check the float model and its dtype"
        )
    if kind == "minmax":
        return torch.maximum(state, largest)
    if kind == "moving_average":
        return torch.where(state > 0, MOMENTUM * state + (1 - MOMENTUM) * largest, largest)
    return _add_to_histogram(state, magnitudes, largest)


def _add_to_histogram(state: Tensor, magnitudes: Tensor, largest: Tensor) -> Tensor:
    """Count `magnitudes`. The upper end is a power of two and doubles when it has to, bins merging in pairs."""
    top, counts = state[:1], state[1:]
    wanted = torch.maximum(top, largest.clamp(min=torch.finfo(torch.float32).tiny).log2().ceil().exp2())
    doublings = torch.where(top > 0, wanted / top.clamp(min=torch.finfo(torch.float64).tiny), 1.0)
    index = torch.arange(BINS, device=state.device) / doublings
    merged = torch.zeros_like(counts).index_add_(0, index.long(), counts)
    bins = (magnitudes.to(torch.float64) * (BINS / wanted)).long().clamp(max=BINS - 1)
    return torch.cat([wanted, merged + torch.bincount(bins, minlength=BINS)])


@torch.no_grad()
def observed_range(kind: str, state: Tensor, levels: int = 127) -> Tensor:
    """The magnitude that maps to the largest code `levels`, a float64 scalar; 0 if nothing was seen."""
    if kind in OBSERVERS[:2]:
        return state[0]
    top, counts = state[0], state[1:]
    edges = torch.arange(1, BINS + 1, device=state.device) * (top / BINS)
    if kind == "percentile":
        below = counts.cumsum(0) / counts.sum().clamp(min=1)
        return edges[(below < PERCENTILE).sum().clamp(max=BINS - 1)]
    largest = edges[counts.nonzero().amax()] if counts.any() else top
    ranges = largest * torch.tensor(SHRINKS, dtype=torch.float64, device=state.device)
    centres, steps = edges - top / (2 * BINS), quotient(ranges[:, None], levels)
    error = (centres - (centres / steps.clamp(min=1e-300)).round().clamp(max=levels) * steps).square() @ counts
    return ranges[error.argmin()]
