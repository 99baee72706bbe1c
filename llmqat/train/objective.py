"""The loss that a training step lowers: cross-entropy on the text, or distance from the float model."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor, nn

from llmqat.config import ResolvedTrain
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.output_head import OutputHead, ReferenceHead
from llmqat.train.losses import ce_loss, hidden_loss, kd_loss

Teacher = FloatCopy | FloatView


class Objective:
    """The loss of a batch, with logits that exist a few tokens at a time.

    Args:
        model: prepared, not wrapped for several processes.
        config: weight of the hidden states.
        teacher: the float model to distil from; None for cross-entropy.
        apart: see `OutputHead`.
    """

    def __init__(self, model: nn.Module, config: ResolvedTrain, teacher: Teacher | None, apart: bool = True) -> None:
        self.config, self.teacher = config, teacher
        self.head = OutputHead(model, apart)
        self.teacher_head = None if teacher is None else ReferenceHead(teacher, apart)
        if self.teacher_head is not None:
            self.teacher_head.share_cast(self.head)

    def loss(
        self, model: nn.Module, ids: Tensor, places: Tensor | None, autocast: Callable[[], AbstractContextManager[None]]
    ) -> Tensor:
        """Loss of one batch, nats.

        Args:
            model: the one given at construction, or its wrapper.
            ids: ``(batch, length)``.
            places: of the positions that count in the flattened batch, ``(tokens,)``; None for all.
            autocast: opens the context in which the models compute.
        """
        # One context a forward: inside one for both, weights that the teacher's cast without gradients would be reused.
        if self.teacher is None or self.teacher_head is None:
            with autocast():
                return ce_loss(self.head.below(model, input_ids=ids, use_cache=False), ids, places)
        # Held-out losses are the KL divergence alone: what is compared must not depend on a weight.
        weight = self.config.hidden_weight if torch.is_grad_enabled() else 0.0
        arguments = {"input_ids": ids, "use_cache": False, "output_hidden_states": weight > 0}
        with self.teacher.active() as float_model, autocast():
            teacher = self.teacher_head.below(float_model, **arguments)
        states = list(teacher.outputs.hidden_states[1:]) if weight > 0 else []
        teacher = replace(teacher, outputs=None)  # which would hold on to the states
        with autocast():
            student = self.head.below(model, **arguments)
            loss = kd_loss(student, teacher, places)
        if weight > 0:
            loss = loss + weight * hidden_loss(student.outputs.hidden_states[1:], states, places)
        return loss
