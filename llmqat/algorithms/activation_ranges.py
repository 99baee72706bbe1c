"""Ranges of static int8 activations: found on calibration data, followed while training, frozen after some steps.

The classic recipe of quantization-aware training (Jacob et al., arXiv 1712.05877, section 3.1). Dynamic activations,
the default, need none of it: their scale is found for each token when it passes.
"""

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmqat.algorithms.blocks import eval_mode
from llmqat.errors import LlmqatError, shortened_list
from llmqat.nn.experts import PROJECTIONS, SplitExperts
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.progress import log, track


def static_layers(model: nn.Module) -> list[FakeQuantLinear]:
    """The layers with static activations."""
    return [m for m in model.modules() if isinstance(m, FakeQuantLinear) and m.scheme.inputs == "static"]


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
        stack.enter_context(eval_mode(model))
        for layer in layers:
            stack.callback(setattr, layer, "enabled", layer.enabled)
            layer.enabled = False
            layer.train()
        for batch in track(batches, "activation ranges", len(batches)):
            model(input_ids=batch.to(device), use_cache=False)
    unreached = fill_missing_ranges(model)
    if unreached:
        log(
            f"no calibration token reached {shortened_list(unreached)}: using the widest activation range of the other "
            "experts in the block; more calibration data (--calibration-samples) gives them ranges of their own"
        )


@torch.no_grad()
def fill_missing_ranges(model: nn.Module) -> list[str]:
    """Give experts that no token reached the widest range of the other experts in the block, projection by projection.

    They get the state of the observer too: tokens that reach them in training move the range on from there.

    Returns:
        the names of these experts.
    """
    unreached: dict[str, None] = {}
    for name, experts in model.named_modules():
        if not isinstance(experts, SplitExperts):
            continue
        for projection in dict(experts[0].named_children()).keys() & set(PROJECTIONS):
            found = [getattr(expert, projection) for expert in experts]
            layers = [getattr(layer, "base_layer", layer) for layer in found]  # adapters may be around it
            if not all(isinstance(layer, FakeQuantLinear) and layer.scheme.inputs == "static" for layer in layers):
                continue
            widest = max(layers, key=lambda layer: float(layer.act_scale))
            for index, layer in enumerate(layers):
                if not layer.act_scale.any() and widest.act_scale.any():
                    layer.act_state.copy_(widest.act_state)
                    layer.act_scale.copy_(widest.act_scale)
                    unreached[f"{name}.{index}"] = None
    return list(unreached)


def check_ranges(model: nn.Module) -> None:
    """Every layer with static activations must have a range.

    Raises:
        LlmqatError: if one has none, naming it.
    """
    static = set(static_layers(model))
    bare = [name for name, module in model.named_modules() if module in static and not module.act_scale.any()]
    if bare:
        raise LlmqatError(
            f"static activations of {shortened_list(bare)} have no range yet: no token reached them; call "
            "llmqat.observe_activations(model, batches) first"
        )


def follow_activations(model: nn.Module, on: bool) -> None:
    """Let the ranges of static activations follow the inputs in training mode, or freeze them.

    Args:
        model: prepared. Where no layer has static activations nothing is done.
        on: True to follow, False to freeze.
    """
    for layer in static_layers(model):
        layer.observing = on
