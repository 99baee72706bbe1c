"""Ranges of static int8 activations: found on calibration data, followed while training, frozen after some steps.

The classic recipe of quantization-aware training (Jacob et al., arXiv 1712.05877, section 3.1). Dynamic activations,
the default, need none of it: their scale is found for each token when it passes.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmqat.algorithms.calibration import evaluating
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.progress import track


def static_layers(model: nn.Module) -> list[FakeQuantLinear]:
    """The layers with static activations."""
    return [m for m in model.modules() if isinstance(m, FakeQuantLinear) and m.scheme.act_static]


@torch.no_grad()
def observe_activations(model: nn.Module, batches: list[Tensor], observer: str | None = None) -> None:
    """Find the ranges of static activations from the float model inside `model`.

    Args:
        model: prepared. Where no layer has static activations nothing is done.
        batches: token ids ``(batch, length)``; may be none.
        observer: start anew with this one (see `llmqat.quant.observers`); None goes on with what was seen.

    Raises:
        LlmqatError: if there is no such observer.
    """
    layers = static_layers(model)
    if observer is not None:
        for layer in layers:
            layer.set_observer(observer)
    if not layers or not batches:
        return
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for layer in layers:
            stack.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
            layer.train()
        for batch in track(batches, "activation ranges", len(batches)):
            model(input_ids=batch.to(device), use_cache=False)


def follow_activations(model: nn.Module, on: bool) -> None:
    """Whether ranges follow the inputs in training mode, or are frozen."""
    for layer in static_layers(model):
        layer.observing = on
