"""Training losses on the logits of a language model, which are made a few tokens at a time (`models.output_head`)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.models.output_head import BelowHead, cached

Targets = Callable[[slice], Tensor]


def token_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token ``(tokens,)`` in nats, and its gradient in the logits ``(tokens, V)``; both float32.

    Args:
        logits: ``(tokens, V)``.
        targets: teacher logits ``(tokens, V)``, for the forward KL ``KL(p_teacher || p)``; or token ids ``(tokens,)``,
            for cross-entropy.
    """
    log_q = torch.log_softmax(logits.float(), -1)
    if targets.ndim == 2:  # KL(p || q) = sum p (log p - log q); d/dlogits = q - p
        log_p = torch.log_softmax(targets.float(), -1)
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), log_q.exp_().sub_(p)
    index = targets.unsqueeze(-1)  # -log q[target]; d/dlogits = q - onehot
    loss = -log_q.gather(-1, index).squeeze(-1)
    return loss, log_q.exp_().scatter_add_(-1, index, torch.full_like(index, -1.0, dtype=log_q.dtype))


def chunk_losses(logits: Tensor, targets: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Loss of each token of a chunk, float32, and the gradient of the mean over all `tokens`, of the dtype of `logits`.

    By `token_losses`, a few tokens at a time, so that its temporaries stay in the cache.
    """
    losses, gradient = [], torch.empty_like(logits)
    for few in cached(logits):
        loss, delta = token_losses(logits[few], targets[few])
        losses.append(loss)
        gradient[few] = delta.div_(tokens)
    return torch.cat(losses), gradient


class _HeadLoss(torch.autograd.Function):
    """Mean over tokens of a loss of each token's logits; all gradients are found in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, below: BelowHead, targets: Targets, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """`hidden (tokens, hidden)` below the head; `targets`: of the tokens of a slice; `parameters` of the head."""
        needed = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        gradients = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)] if needed else []
        for chunk in below.chunks(len(hidden)):
            inputs = hidden[chunk].detach().requires_grad_(needed)
            with torch.set_grad_enabled(needed):
                logits = below.logits(inputs)
            # After the student: weights cast without gradients first would be reused by autocast, and have none.
            theirs = targets(chunk)
            loss, delta = chunk_losses(logits.detach(), theirs, len(hidden))
            total += loss.sum()
            if needed:
                found = torch.autograd.grad(logits, [inputs, *parameters], delta)
                gradients[0][chunk] = found[0]
                for gradient, part in zip(gradients[1:], found[1:], strict=True):
                    gradient += part
        ctx.gradients = gradients
        return total / len(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(gradient * grad for gradient in ctx.gradients)


def kd_loss(student: BelowHead, teacher: BelowHead, places: Tensor | None = None) -> Tensor:
    """Forward KL from the teacher, ``KL(p_teacher || p_student)`` at temperature 1, mean over tokens (nats).

    Args:
        student: its forward ``(batch, length)``.
        teacher: the teacher's forward on the same tokens, without gradients.
        places: of the positions that count in the flattened batch, ``(tokens,)``; by default all.
    """
    theirs = _tokens(teacher.hidden, places)
    return _head_loss(student, lambda chunk: teacher.logits(theirs[chunk]), _tokens(student.hidden, places))


class _HiddenLoss(torch.autograd.Function):
    """Mean relative squared error of hidden states; the differences become the gradients, in place."""

    @staticmethod
    def forward(ctx: Any, targets: list[Tensor], places: Tensor | None, *states: Tensor) -> Tensor:
        """`targets` are let go of one by one."""
        errors, ctx.differences, ctx.powers, ctx.places = [], [], [], places
        ctx.dtypes = [state.dtype for state in states]
        for state in states:
            target = targets.pop(0).float()
            power = target.square().sum(-1).clamp(min=1e-12)
            difference = state.float() - target
            error = difference.square().sum(-1) / power
            errors.append(_tokens(error, places).mean())
            ctx.differences.append(difference)
            ctx.powers.append(power)
        return torch.stack(errors).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, blocks = [], len(ctx.differences)
        for difference, power, dtype in zip(ctx.differences, ctx.powers, ctx.dtypes, strict=True):
            weight = torch.ones_like(power)
            if ctx.places is not None:
                weight = torch.zeros_like(power).flatten().index_fill_(0, ctx.places, 1).view_as(power)
            of_token = weight * (grad / blocks / weight.sum()) / power
            gradients.append(difference.mul_(2).mul_(of_token.unsqueeze(-1)).to(dtype))
        return None, None, *gradients


def hidden_loss(states: Sequence[Tensor], teacher_states: list[Tensor], places: Tensor | None = None) -> Tensor:
    """Squared error of hidden states relative to the teacher's, ``|h - h_T|^2 / |h_T|^2``, mean over tokens and blocks.

    A denser signal than the logits alone: each block is told its own error. On the bundled Llama at 4 bits it took
    almost twice as much off the KL divergence to float in the same number of tokens.

    Args:
        states: ``(batch, length, hidden)`` after each block.
        teacher_states: the teacher's, of the same shapes; emptied, so that they go as the differences are made.
        places: of the positions that count in the flattened batch, ``(tokens,)``; by default all.

    Raises:
        LlmqatError: if the two models differ in depth or width.
    """
    if [state.shape for state in states] != [target.shape for target in teacher_states]:
        raise LlmqatError("hidden states of model and teacher differ in depth or width; set hidden_weight to 0")
    loss: Tensor = _HiddenLoss.apply(teacher_states, places, *states)
    return loss


def ce_loss(student: BelowHead, input_ids: Tensor, places: Tensor | None = None) -> Tensor:
    """Next-token cross-entropy, mean over tokens (nats).

    Args:
        student: its forward ``(batch, length)``.
        input_ids: ``(batch, length)``.
        places: of the positions that count (each predicts the token after it) in the flattened batch, ``(tokens,)``; by
            default all but the last of each sequence.
    """
    if places is None:
        targets, hidden = _tokens(input_ids[:, 1:]), _tokens(student.hidden[:, :-1])
    else:
        targets, hidden = _tokens(input_ids.roll(-1, 1), places), _tokens(student.hidden, places)
    return _head_loss(student, targets.__getitem__, hidden)


def _tokens(values: Tensor, places: Tensor | None = None) -> Tensor:
    """``(batch, length, ...)`` as ``(tokens, ...)``: the positions that count, or all.

    By places, and not by a mask, whose length the host would have to wait for.
    """
    flat = values.flatten(0, 1)
    return flat if places is None else flat[places]


def _head_loss(student: BelowHead, targets: Targets, hidden: Tensor) -> Tensor:
    loss: Tensor = _HeadLoss.apply(student, targets, hidden, *student.parameters)
    return loss
