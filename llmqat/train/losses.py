"""Training losses on the logits of a language model, which are made a few tokens at a time (`models.output_head`)."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.kernels import losses as kernels
from llmqat.kernels import training
from llmqat.kernels.products import add_product, multiply
from llmqat.models.output_head import BelowHead, HeadWeights, cached
from llmqat.quant.fake_quant import compute_dtype

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


def chunk_losses(logits: Tensor, targets: Tensor, tokens: int, into: Tensor | None) -> Tensor:
    """Loss of each token of a chunk, float32, by kernels where there are some, else by `token_losses`.

    Args:
        logits: as in `token_losses`.
        targets: likewise.
        tokens: of all chunks.
        into: takes the gradient of the mean over all tokens, of the dtype of `logits`; may be these themselves.
    """
    if kernels.supports(logits) and (targets.ndim == 1 or kernels.supports(targets)):
        return kernels.token_losses(logits, targets, 1 / tokens, into)
    losses = []
    for few in cached(logits):  # so that temporaries stay in the cache
        loss, delta = token_losses(logits[few], targets[few])
        losses.append(loss)
        if into is not None:
            into[few] = delta.div_(tokens)
    return torch.cat(losses)


class _Task(NamedTuple):
    """Tokens of a batch by their states `hidden (tokens, hidden)` below the head, their targets, and what trains."""

    below: BelowHead
    targets: Targets
    hidden: Tensor
    parameters: tuple[Tensor, ...]  # of the head
    needed: bool  # whether gradients are


def _by_products(task: _Task, weights: HeadWeights) -> tuple[Tensor, list[Tensor]]:
    """Mean loss and its gradients, of a head that is a Linear: by products alone, and logits become their gradient."""
    hidden, (weight, bias) = task.hidden, weights
    total, of_hidden = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
    of_head: dict[int, Tensor] = {}
    for chunk in task.below.chunks(len(hidden)):
        inputs = hidden[chunk].to(weight.dtype)
        logits = multiply(inputs, weight.T, bias)
        total += chunk_losses(logits, task.targets(chunk), len(hidden), logits if task.needed else None).sum()
        if not task.needed:
            continue
        of_hidden[chunk] = multiply(logits, weight, dtype=hidden.dtype)
        for i, parameter in enumerate(task.parameters):
            if parameter.ndim == 1:
                of_head[i] = of_head.get(i, 0) + logits.sum(0, dtype=torch.float32)
            elif i in of_head:
                add_product(of_head[i], logits.T, inputs)
            else:
                of_head[i] = multiply(logits.T, inputs, dtype=torch.float32)
    of_parameters = [of_head[i].to(parameter.dtype) for i, parameter in enumerate(task.parameters) if task.needed]
    return total / len(hidden), [of_hidden, *of_parameters]


def _by_autograd(task: _Task) -> tuple[Tensor, list[Tensor]]:
    """Mean loss and its gradients, of any head, differentiated chunk by chunk."""
    hidden, parameters = task.hidden, task.parameters
    total = torch.zeros((), device=hidden.device)
    gradients = [torch.zeros_like(tensor) for tensor in (hidden, *parameters)] if task.needed else []
    for chunk in task.below.chunks(len(hidden)):
        inputs = hidden[chunk].detach().requires_grad_(task.needed)
        with torch.set_grad_enabled(task.needed):
            logits = task.below.logits(inputs)
        # After the student: weights cast without gradients first would be reused by autocast, and have none.
        theirs, delta = task.targets(chunk), torch.empty_like(logits) if task.needed else None
        total += chunk_losses(logits.detach(), theirs, len(hidden), delta).sum()
        if task.needed:
            found = torch.autograd.grad(logits, [inputs, *parameters], delta)
            gradients[0][chunk] = found[0]
            for gradient, part in zip(gradients[1:], found[1:], strict=True):
                gradient += part
    return total / len(hidden), gradients


class _HeadLoss(torch.autograd.Function):
    """Mean over tokens of a loss of each token's logits; all gradients are found in the forward, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, below: BelowHead, targets: Targets, hidden: Tensor, *parameters: Tensor) -> Tensor:
        """`hidden (tokens, hidden)` below the head; `targets`: of the tokens of a slice; `parameters` of the head."""
        task = _Task(below, targets, hidden, parameters, any(ctx.needs_input_grad))
        weights = None if below.weights is None else below.weights(compute_dtype(hidden))
        loss, ctx.gradients = _by_autograd(task) if weights is None else _by_products(task, weights)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_given_away(ctx, grad)


def _given_away(ctx: Any, grad: Tensor) -> list[Tensor]:
    """Gradients that a forward has found, times `grad`, and held no more, so that what takes them need not copy them.

    Raises:
        LlmqatError: the second time.
    """
    gradients, ctx.gradients = ctx.gradients, None
    if gradients is None:
        raise LlmqatError("the gradients of this loss are gone: call backward once for each forward")
    # Spares a pass over them. On a GPU, to ask would be to wait. In place, since they may be as large as all states.
    return gradients if training.readable(grad) and grad == 1 else [gradient.mul_(grad) for gradient in gradients]


def kd_loss(student: BelowHead, teacher: BelowHead, places: Tensor | None = None) -> Tensor:
    """Forward KL from the teacher, ``KL(p_teacher || p_student)`` at temperature 1, mean over tokens (nats).

    Args:
        student: its forward ``(batch, length)``.
        teacher: the teacher's forward on the same tokens, without gradients.
        places: of the positions that count in the flattened batch, ``(tokens,)``; by default all.
    """
    theirs = _tokens(teacher.hidden, places)
    return _head_loss(student, lambda chunk: teacher.logits(theirs[chunk]), _tokens(student.hidden, places))


def state_errors(states: Tensor, targets: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of each state relative to its target, float32, and its gradient in the dtype of the states.

    Args:
        states: ``(..., width)``.
        targets: of the same shape.
        factors: of the gradients, ``(...)``.
    """
    targets = targets.float()
    power = targets.square().sum(-1).clamp(min=1e-12)
    difference = states.float() - targets
    errors = difference.square().sum(-1) / power
    return errors, difference.mul_(2).mul_((factors / power).unsqueeze(-1)).to(states.dtype)


class _HiddenLoss(torch.autograd.Function):
    """Mean relative squared error of hidden states; the gradients are found in the forward."""

    @staticmethod
    def forward(ctx: Any, targets: list[Tensor], places: Tensor | None, *states: Tensor) -> Tensor:
        """`targets` are let go of one by one."""
        errors, ctx.gradients = [], []
        weights = torch.ones(states[0].shape[:-1], device=states[0].device)
        if places is not None:
            weights = torch.zeros_like(weights).flatten().index_fill_(0, places, 1).view_as(weights)
        weights /= len(states) * weights.sum()
        for state in states:
            target = targets.pop(0)
            find = kernels.state_errors if kernels.supports(state, target) else state_errors
            error, gradient = find(state, target, weights)
            errors.append(_tokens(error, places).mean())
            ctx.gradients.append(gradient)
        return torch.stack(errors).mean()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *_given_away(ctx, grad)


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
