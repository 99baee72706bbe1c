"""int8 activations for a packed model that was trained without them: faster, and no longer what was trained.

An explicit choice of who runs the model (``activations="int8"``), never a default. What it costs is measured against
the same model as it was trained, see `AsTrained`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from llmqat.errors import LlmqatError
from llmqat.nn.packed_linear import PackedLinear


def serve_int8_activations(model: nn.Module) -> None:
    """Let the packed layers of `model` quantize their input, dynamically and per token; those trained so do already.

    Raises:
        LlmqatError: if all of them do, or there are none.
    """
    layers = [m for m in model.modules() if isinstance(m, PackedLinear) and m.scheme.inputs == "float"]
    if not layers:
        raise LlmqatError("activations='int8' is for packed layers that were trained without: this model has none")
    for layer in layers:
        layer.scheme, layer.trained_scheme = replace(layer.scheme, act_bits=8), layer.scheme


class AsTrained:
    """Gives the model as it was trained: the reference with which `evaluate` compares `serve_int8_activations`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @contextmanager
    def active(self, part: nn.Module | None = None) -> Iterator[nn.Module]:
        """The model or `part` of it, with the activations of training, without gradients."""
        chosen = self.model if part is None else part
        with ExitStack() as stack, torch.no_grad():
            for module in chosen.modules():
                if isinstance(module, PackedLinear) and module.trained_scheme is not None:
                    stack.callback(setattr, module, "scheme", module.scheme)
                    module.scheme = module.trained_scheme
            yield chosen
