"""Ranges of static int8 activations: found on calibration data, followed while training, frozen after some steps.

The classic recipe of quantization-aware training (Jacob et al., arXiv 1712.05877, section 3.1). Dynamic activations,
the default, need none of it: their scale is found for each token when it passes.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmqat.algorithms.blocks import evaluating
from llmqat.errors import LlmqatError
from llmqat.nn.experts import PROJECTIONS, SplitExperts
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.progress import say, track

NAMED = 5  # layers in a message


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
    lent = lend_ranges(model)
    if lent:
        say(
            f"no calibration token reached {named(lent)}: their activations take the widest range of "
            "the experts beside them until tokens come; more calibration data would give them their own"
        )


@torch.no_grad()
def lend_ranges(model: nn.Module) -> list[str]:
    """Give experts that no token reached the widest range among the experts beside them, projection by projection.

    The state of the observer comes with it: what reaches them in training moves the range on from there.

    Returns:
        the names of these experts.
    """
    lent: dict[str, None] = {}
    for name, experts in model.named_modules():
        if not isinstance(experts, SplitExperts):
            continue
        for projection in PROJECTIONS:
            found = [getattr(expert, projection) for expert in experts]
            layers = [getattr(layer, "base_layer", layer) for layer in found]  # adapters may be around it
            if not all(isinstance(layer, FakeQuantLinear) and layer.scheme.act_static for layer in layers):
                continue
            widest = max(layers, key=lambda layer: float(layer.act_scale))
            for index, layer in enumerate(layers):
                if not layer.act_scale.any() and widest.act_scale.any():
                    layer.act_state.copy_(widest.act_state)
                    layer.act_scale.copy_(widest.act_scale)
                    lent[f"{name}.{index}"] = None
    return list(lent)


def check_ranges(model: nn.Module) -> None:
    """Every layer with static activations must have a range.

    Raises:
        LlmqatError: if one has none, naming it.
    """
    static = set(static_layers(model))
    bare = [name for name, module in model.named_modules() if module in static and not module.act_scale.any()]
    if bare:
        raise LlmqatError(
            f"static activations of {named(bare)} have no range yet: no token reached them; call "
            "llmqat.observe_activations(model, batches) first"
        )


def named(names: list[str]) -> str:
    """The first names, and how many more."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def follow_activations(model: nn.Module, on: bool) -> None:
    """Whether ranges of static activations follow the inputs in training mode, or are frozen.

    Args:
        model: prepared. Where no layer has static activations nothing is done.
        on: True follows.
    """
    for layer in static_layers(model):
        layer.observing = on
