"""Losses and scores of tokens by their logits, and errors of hidden states, each with its gradient, in one launch.

The formulas are those of the compiled kernels of CPUs (csrc/shared/losses.inc), in float32 whatever the dtype of the
logits. A program takes one token, so that no sum crosses programs and a run repeats. It passes twice over its logits:
first every lane of a tile keeps the largest logit it has seen and the sum of ``exp(x - largest)`` (Milakov and
Gimelshein, arXiv:1805.02867), then losses and gradients are made; so each logit of student and teacher is read twice
and each gradient is written once, in place if that is wanted. Cross-entropy without a gradient needs the first alone.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmqat.kernels.gpu.launch import on
from llmqat.kernels.gpu.numerics import EXACT, nearest
from llmqat.kernels.gpu.tiles import Tile, logits_tile, rows_tile

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # not -inf, of which the distance to itself is NaN


@torch.no_grad()
def token_losses(
    logits: Tensor, targets: Tensor, factor: float, gradient: Tensor | None, tile: Tile | None = None
) -> Tensor:
    """Loss of each token ``(tokens,)`` in nats, float32.

    An id beyond the vocabulary makes the loss of its token NaN, and its gradient: to refuse it as on a CPU the host
    would have to wait for the device, and an assertion there would end the process.

    Args:
        logits: ``(tokens, V)``.
        targets: teacher logits ``(tokens, V)``, for ``KL(p_teacher || p)``; or token ids ``(tokens,)``, for
            cross-entropy.
        factor: of the gradient.
        gradient: of each token's loss in its logits, times `factor`, is written here, contiguous and of their dtype;
            may be the logits themselves.
        tile: of a program; None for that of the table.
    """
    logits, targets = logits.contiguous(), targets.contiguous()
    losses = torch.empty(len(logits), device=logits.device)
    teacher, ids = (targets, None) if targets.ndim == 2 else (None, targets)
    constants, options = _constants(logits, tile)
    tokens = _Tokens(logits, teacher, ids, losses, gradient)
    with on(logits.device):
        _token_losses[(len(logits),)](tokens, float(factor), constants, **options)
    return losses


@torch.no_grad()
def token_scores(
    logits: Tensor, following: Tensor, float_logits: Tensor | None = None, tile: Tile | None = None
) -> Tensor:
    """Cross-entropy, KL from the float model and agreement with it of each token, ``(3, tokens)`` float32.

    The float model agrees where its first largest logit is that of the model. Without it, KL and agreement are 0. An id
    beyond the vocabulary makes the cross-entropy NaN.

    Args:
        logits: ``(tokens, V)``.
        following: ids of the tokens to predict ``(tokens,)``.
        float_logits: of the float model ``(tokens, V)``.
        tile: of a program; None for that of the table.
    """
    logits, following = logits.contiguous(), following.contiguous()
    teacher = None if float_logits is None else float_logits.contiguous()
    scores = torch.empty(3, len(logits), device=logits.device)
    constants, options = _constants(logits, tile)
    with on(logits.device):
        _token_scores[(len(logits),)](_Tokens(logits, teacher, following, scores, None), constants, **options)
    return scores


@torch.no_grad()
def state_errors(states: Tensor, targets: Tensor, factors: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """Relative squared error of each state, float32, and its gradient in the dtype of the states.

    Reads states and targets twice, the second time mostly from a cache, and writes the gradient once.

    Args:
        states: ``(..., width)``.
        targets: of the same shape.
        factors: of the gradients, ``(...)``.
        tile: of a program; None for that of the table.
    """
    states, targets, factors = states.contiguous(), targets.contiguous(), factors.float().contiguous()
    errors = torch.empty(states.shape[:-1], device=states.device)
    gradient, width = torch.empty_like(states), states.shape[-1]
    tile = tile or rows_tile(width)
    constants = _Width(width, tile.rows, tile.width)
    with on(states.device):
        _state_errors[(triton.cdiv(errors.numel(), tile.rows),)](
            _States(states, targets, factors, errors, gradient),
            errors.numel(),
            constants,
            num_warps=tile.warps,
            **EXACT,
        )
    return errors, gradient


class _Tokens(NamedTuple):
    """Logits, what they aim at, and where results go; None for what there is not."""

    logits: Tensor
    teacher: Tensor | None
    ids: Tensor | None
    found: Tensor
    gradient: Tensor | None


class _States(NamedTuple):
    """States, what they aim at, and where results go."""

    states: Tensor
    targets: Tensor
    factors: Tensor
    errors: Tensor
    gradient: Tensor


class _Width(NamedTuple):
    """Numbers for each set of which a kernel is compiled: columns of a row, rows and columns of a tile."""

    columns: int
    rows: int
    width: int


def _constants(logits: Tensor, tile: Tile | None) -> tuple[_Width, dict[str, object]]:
    """Constants and options of a launch over tokens."""
    vocabulary = logits.shape[1]
    tile = tile or logits_tile(vocabulary)
    return _Width(vocabulary, 1, tile.width), {"num_warps": tile.warps, **EXACT}


@triton.jit
def _token_losses(tokens, factor, C: tl.constexpr):
    """Write the loss of one token, and its gradient if there is a place for it."""
    token = tl.program_id(0)
    base = token.to(tl.int64) * C.columns
    if tokens.teacher is not None:
        q, p = _softmax(tokens.logits + base, C), _softmax(tokens.teacher + base, C)
        tl.store(tokens.found + token, _divergence(tokens, base, q, p, factor, C))
    else:
        # Before any reduction: behind it the first threads write gradients over the logits.
        id, aimed = _aimed(tokens, token, base, C)
        most, total, _ = _softmax(tokens.logits + base, C)
        tl.store(tokens.found + token, tl.log(total) - (aimed - most))
        if tokens.gradient is not None:
            inverse = tl.where(aimed == aimed, tl.div_rn(1.0, total), float("nan"))
            for start in range(0, C.columns, C.width):
                column = start + tl.arange(0, C.width)
                q = tl.exp(_row(tokens.logits + base, column, C) - most) * inverse
                _put(tokens.gradient + base, tl.where(column == id, q - 1.0, q) * factor, column, C)


@triton.jit
def _token_scores(tokens, C: tl.constexpr):
    """Write cross-entropy, divergence and agreement of one token."""
    token, count = tl.program_id(0), tl.num_programs(0)
    base = token.to(tl.int64) * C.columns
    _, aimed = _aimed(tokens, token, base, C)
    q = _softmax(tokens.logits + base, C)
    tl.store(tokens.found + token, tl.log(q[1]) - (aimed - q[0]))
    divergence, agreement = 0.0, 0.0
    if tokens.teacher is not None:
        p = _softmax(tokens.teacher + base, C)
        divergence = _divergence(tokens, base, q, p, 1.0, C)
        agreement = tl.where(q[2] == p[2], 1.0, 0.0)
    tl.store(tokens.found + count + token, divergence)
    tl.store(tokens.found + 2 * count + token, agreement)


@triton.jit
def _state_errors(tokens, count, C: tl.constexpr):
    """Write the errors of some states, and their gradients."""
    row = tl.program_id(0) * C.rows + tl.arange(0, C.rows)
    there = row < count
    power, error = tl.full([C.rows], 0.0, tl.float32), tl.full([C.rows], 0.0, tl.float32)
    for start in range(0, C.columns, C.width):
        difference, target, _, _ = _differences(tokens, row, start, there, C)
        error += tl.sum(difference * difference, 1)
        power += tl.sum(target * target, 1)
    power = tl.where(power < 1e-12, 1e-12, power)
    tl.store(tokens.errors + row, tl.div_rn(error, power), there)
    factor = tl.div_rn(2.0 * tl.load(tokens.factors + row, there, other=0.0), power)
    for start in range(0, C.columns, C.width):
        difference, _, place, inside = _differences(tokens, row, start, there, C)
        dtype: tl.constexpr = tokens.gradient.dtype.element_ty
        tl.store(tokens.gradient + place, nearest(difference * factor[:, None], dtype), inside)


@triton.jit
def _softmax(row, C: tl.constexpr):
    """The largest of a row of logits, the sum of ``exp(x - largest)``, and the first column of the largest."""
    most, total = tl.full([C.width], _LOWEST, tl.float32), tl.full([C.width], 0.0, tl.float32)
    first = tl.full([C.width], 0, tl.int32)
    for start in range(0, C.columns, C.width):
        column = start + tl.arange(0, C.width)
        x = _row(row, column, C)
        rises = x > most
        apart = tl.exp(-tl.abs(x - most))  # one exponential, whichever of the two is the larger
        total = tl.where(rises, total * apart + 1.0, total + apart)
        first = tl.where(rises, column, first)
        most = tl.where(rises, x, most)
    largest = tl.max(most, 0)
    return largest, tl.sum(total * tl.exp(most - largest), 0), tl.min(tl.where(most == largest, first, C.columns), 0)


@triton.jit
def _divergence(tokens, base, q, p, factor, C: tl.constexpr):
    """``KL(p || q)`` by the parts of both softmaxes; writes gradients ``(q - p) factor`` if there is a place for them.

    Since p and q both sum to 1, its terms are ``p (u + e^-u - 1)``, ``u = log p - log q``: none is negative, and an
    error of `apart` counts squared. Where u is small, terms and gradients are taken from the series of ``e^-u``.
    """
    apart = (p[0] - q[0]) + tl.log(tl.div_rn(p[1], q[1]))
    p_inverse, q_inverse = tl.div_rn(1.0, p[1]), tl.div_rn(1.0, q[1])
    loss = tl.full([C.width], 0.0, tl.float32)
    for start in range(0, C.columns, C.width):
        column = start + tl.arange(0, C.width)
        t, s = _row(tokens.teacher + base, column, C), _row(tokens.logits + base, column, C)
        u = (t - s) - apart
        of_p, of_q = tl.exp(t - p[0]) * p_inverse, tl.exp(s - q[0]) * q_inverse
        h = _distance(u)
        near = tl.abs(u) < 0.5
        term = tl.where(near, of_p * h, of_p * u + (of_q - of_p))
        loss += tl.where(column < C.columns, term, 0.0)
        if tokens.gradient is not None:
            _put(tokens.gradient + base, tl.where(near, of_p * (h - u), of_q - of_p) * factor, column, C)
    return tl.sum(loss, 0)


@triton.jit
def _distance(u):
    """``u + e^-u - 1`` by its series, for small `u`."""
    h = tl.fma(u, -2.7557319e-6, 2.4801587e-5)
    h = tl.fma(-u, h, 1.9841270e-4)
    h = tl.fma(-u, h, 1.3888889e-3)
    h = tl.fma(-u, h, 8.3333333e-3)
    h = tl.fma(-u, h, 4.1666667e-2)
    h = tl.fma(-u, h, 1.6666667e-1)
    return tl.fma(-u, h, 0.5) * u * u


@triton.jit
def _aimed(tokens, token, base, C: tl.constexpr):
    """The id that a token aims at, and its logit; NaN for one beyond the vocabulary."""
    id = tl.load(tokens.ids + token)
    known = (id >= 0) & (id < C.columns)
    return id, tl.where(known, tl.load(tokens.logits + base + tl.where(known, id, 0)).to(tl.float32), float("nan"))


@triton.jit
def _row(row, column, C: tl.constexpr):
    """Logits of a row at some columns, float32; minus infinity past its end."""
    return tl.load(row + column, column < C.columns, other=-float("inf")).to(tl.float32)


@triton.jit
def _put(row, x, column, C: tl.constexpr):
    """Round `x` to the dtype of a row of gradients, and write it at some columns."""
    dtype: tl.constexpr = row.dtype.element_ty
    tl.store(row + column, nearest(x, dtype), column < C.columns)


@triton.jit
def _differences(tokens, row, start, there, C: tl.constexpr):
    """States less their targets, the targets, where both lie, and which of them are there, each ``(rows, width)``."""
    column = start + tl.arange(0, C.width)
    inside = there[:, None] & (column < C.columns)[None, :]
    place = row.to(tl.int64)[:, None] * C.columns + column[None, :]
    target = tl.load(tokens.targets + place, inside, other=0.0).to(tl.float32)
    return tl.load(tokens.states + place, inside, other=0.0).to(tl.float32) - target, target, place, inside
