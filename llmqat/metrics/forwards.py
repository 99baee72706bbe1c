"""Forwards of a model over the windows that are scored, stopped below its output head."""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmqat.metrics.layer_error import STRIDE, sampled_outputs
from llmqat.models.output_head import BelowHead, OutputHead, Reference, ReferenceHead
from llmqat.models.patcher import transformers_model


class Forward(NamedTuple):
    """One forward: where it stopped, and a sample of the outputs of the watched layers, by name."""

    below: BelowHead
    outputs: dict[str, Tensor]


class Kept(NamedTuple):
    """The remains of a forward whose head ran apart, on the CPU: nothing of the size of the vocabulary.

    Attributes:
        hidden: input of the head ``(windows, window, hidden)``.
        vocabulary: logits of a token.
        outputs: of the watched layers, but for the head's.
    """

    hidden: Tensor
    vocabulary: int
    outputs: dict[str, Tensor]


class Forwards:
    """Runs a model over batches of windows.

    Args:
        model: in evaluation mode.
        layers: names of layers whose outputs are sampled.
        head: of the model, by default its own.
    """

    def __init__(self, model: nn.Module, layers: Iterable[str] = (), head: OutputHead | None = None) -> None:
        self.model, self.layers, self.head = model, tuple(layers), head or OutputHead(model)
        modules = dict(transformers_model(model).named_modules()) if self.layers else {}
        self.head_name = next((name for name in self.layers if modules.get(name) is self.head.layer), None)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def of(self, index: int, ids: Tensor) -> Forward:
        """The forward of the batch ``(windows, window)`` with that `index`."""
        with sampled_outputs(self.model, self.layers, ids.numel()) as outputs:
            below = self.head.below(self.model, input_ids=ids, use_cache=False)
        return Forward(below, self.with_head(outputs, below.hidden))

    def with_head(self, outputs: dict[str, Tensor], hidden: Tensor) -> dict[str, Tensor]:
        """The given `outputs`, and the output head's where that is watched and ran apart: only inputs were sampled."""
        if self.head_name is None or self.head.layer is None:
            return outputs
        return outputs | {self.head_name: self.head.output(hidden.flatten(0, 1)[::STRIDE])}


class ReferenceForwards(Forwards):
    """Runs the float model that others are compared with.

    Args:
        reference: gives the model.
        layers: as in `Forwards`.
        kept: earlier forwards, by the index of their batch, which are not repeated.
    """

    def __init__(
        self, reference: Reference, layers: Iterable[str] = (), kept: Mapping[int, Kept] = MappingProxyType({})
    ) -> None:
        self.reference, self.kept = reference, kept
        with reference.active() as model:
            super().__init__(model, layers, ReferenceHead(reference))

    def of(self, index: int, ids: Tensor) -> Forward:
        """The forward of the batch with that `index`: from memory where it is kept."""
        if index in self.kept:
            hidden, vocabulary, outputs = self.kept[index]
            below = BelowHead(None, hidden.to(ids.device), self.head.logits, vocabulary)
            return Forward(below, self.with_head(outputs, below.hidden))
        with self.reference.active():
            return super().of(index, ids)
