"""Measure what each layer of a float model loses at fewer bits, and choose its bits by that."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.algorithms.allocation import Unit, allocate
from llmqat.algorithms.blocks import eval_mode
from llmqat.errors import LlmqatError
from llmqat.models.experts import fused_experts
from llmqat.models.output_head import OutputHead
from llmqat.models.planning import Overrides, plan
from llmqat.progress import log, track
from llmqat.quant.affine import on_grid
from llmqat.scheme import BITS, QuantScheme

MEASURED_TOKENS = 8192  # of the calibration text, in a run
TOGETHER = 2048  # of them in a batch: weights are rounded once for each


class Sensitivity:
    """Sums what layers lose at other bits, over batches of token ids.

    The loss is the KL divergence of the model's predictions, to second order in the change of one layer's output:

        KL ~ 1/2 E[(g_t . (W_hat - W) x_t)^2]   a token,   g_t = d log p(y) / d (W x_t),   y drawn from p

    because the Hessian of the KL divergence is the Fisher information (Martens, arXiv:1412.1193, section 9), of which
    the gradient at a sample of the model's own prediction is an unbiased estimate. Errors of several tokens, and of
    several layers, are taken as independent.

    Args:
        model: float.
        layers: on the grid to come: module by name.
        schemes: those that each layer may get.
    """

    def __init__(self, model: PreTrainedModel, layers: dict[str, nn.Linear], schemes: Sequence[QuantScheme]) -> None:
        self.model, self.layers, self.schemes = model, layers, schemes
        self.head = OutputHead(model)
        self.losses = {name: {scheme.bits: 0.0 for scheme in schemes} for name in layers}
        self.reads: dict[str, int] = {}  # layer -> the first layer that reads its input, by number
        self.tokens = 0

    def add(self, ids: Tensor, generator: torch.Generator) -> None:
        """Add the losses on a batch ``(batch, length)``; `generator`, of the CPU, draws the predictions."""
        device = next(self.model.parameters()).device
        with torch.enable_grad(), self._watched() as embedded, torch.autocast(device.type, torch.bfloat16):
            below = self.head.below(self.model, input_ids=ids.to(device), use_cache=False)
            hidden = below.hidden.detach().flatten(0, -2)
            gradients = list[Tensor]()
            for chunk in below.chunks(len(hidden)):
                states = hidden[chunk].requires_grad_(True)
                log_p = below.logits(states).float().log_softmax(-1)
                drawn = torch.rand(len(log_p), 1, generator=generator).to(device)
                sample = torch.searchsorted(log_p.detach().exp().cumsum(-1), drawn).clamp(max=log_p.shape[-1] - 1)
                gradients += torch.autograd.grad(log_p.gather(-1, sample).sum(), states)
            # Of the embeddings alone: the parameters of the model are the caller's, and may be marked to train.
            torch.autograd.grad(below.hidden.flatten(0, -2), embedded, torch.cat(gradients))
        self.tokens += ids.numel()

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """Inside the ``with``, every layer adds its losses when the gradient of its output comes by.

        Yields:
            what the embedding returns, where the graph begins.
        """
        inputs: dict[int, tuple[int, Tensor]] = {}  # kept: an address is not used again
        embedded: list[Tensor] = []

        def watch(name: str) -> Any:
            def after(layer: nn.Linear, arguments: tuple[Tensor, ...], output: Tensor) -> None:
                x = arguments[0]
                self.reads[name], _ = inputs.setdefault(id(x), (len(inputs), x))
                output.register_hook(lambda gradient: self._add(name, layer, x.detach(), gradient))

            return after

        def begin(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            embedded.append(output.detach().requires_grad_(True))
            return embedded[-1]

        handles = [layer.register_forward_hook(watch(name)) for name, layer in self.layers.items()]
        handles.append(self.model.get_input_embeddings().register_forward_hook(begin))
        try:
            yield embedded
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _add(self, name: str, layer: nn.Linear, x: Tensor, gradient: Tensor) -> None:
        x, gradient, weight = x.flatten(0, -2).to(gradient.dtype), gradient.flatten(0, -2), layer.weight.float()
        for scheme in self.schemes:
            change = (on_grid(weight, scheme, layer.weight.dtype) - weight).to(gradient.dtype)
            loss = (gradient.float() * (x @ change.T).float()).sum(-1).square().sum() / 2
            self.losses[name][scheme.bits] += float(loss)

    def units(self) -> list[Unit]:
        """The layers by the tensor that they read, with the mean loss of a token."""
        members: dict[Any, list[str]] = defaultdict(list)
        for name in self.layers:
            members[self.reads.get(name, name)].append(name)
        return [
            Unit(
                tuple(names),
                sum(self.layers[name].weight.numel() for name in names),
                {bits: sum(self.losses[name][bits] for name in names) / self.tokens for bits in self.losses[names[0]]},
            )
            for names in members.values()
        ]


def candidates(average: float) -> tuple[int, ...]:
    """Bits that a layer may get: from an average of 4 on those that engines serve, below it also fewer.

    Raises:
        LlmqatError: if no such average can be had.
    """
    if not BITS[0] <= average <= BITS[-1]:
        raise LlmqatError(f"average must lie between {BITS[0]} and {BITS[-1]} bits per weight, got {average:g}")
    return tuple(bits for bits in BITS if bits >= min(4, math.floor(average)))


def choose_bits(
    model: PreTrainedModel,
    scheme: QuantScheme,
    calibration: Sequence[Tensor],
    average: float,
    *,
    overrides: Overrides | None = None,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Give each layer of a float model 2, 3, 4 or 8 bits, by what its rounding costs the model's predictions.

    Layers that read the same tensor, such as q, k and v, get the same. From an average of 4 on there are 4 and 8 bits
    only, which engines serve.

    Args:
        model: float, before `prepare`.
        scheme: of all layers but for their bits.
        calibration: batches ``(batch, length)`` of token ids; a few thousand tokens do.
        average: bits per weight, scales not counted, of the layers that no override touches.
        overrides: those of `prepare`; what they touch keeps its own bits, and is not counted.
        seed: of the predictions that are drawn.

    Returns:
        overrides for `prepare`, of the layers that get other bits than the scheme's.

    Raises:
        LlmqatError: if the average is out of range, the model's layers must all have one grid, or overrides touch all.
    """
    bits = candidates(average)
    layers = _open_layers(model, scheme, overrides or {})
    schemes = [replace(scheme, bits=count) for count in bits]
    measured = Sensitivity(model, layers, schemes)
    generator = torch.Generator().manual_seed(seed)
    with eval_mode(model):
        for batch in track(calibration, "sensitivity of the layers", len(calibration)):
            measured.add(batch, generator)
    chosen: dict[int, list[str]] = defaultdict(list)
    units = measured.units()
    found = list(zip(units, allocate(units, average), strict=True))
    for unit, count in found:
        chosen[count] += unit.layers
    spent = sum(count * unit.parameters for unit, count in found) / sum(unit.parameters for unit, _ in found)
    counts = ", ".join(f"{count} for {len(names)} layers" for count, names in sorted(chosen.items()))
    log(f"bits: {counts}; {spent:.2f} on average")
    return {
        pattern: {"bits": count}
        for count, names in sorted(chosen.items())
        if count != scheme.bits
        for pattern in patterns(names)
    }


def _open_layers(model: PreTrainedModel, scheme: QuantScheme, overrides: Overrides) -> dict[str, nn.Linear]:
    """The layers inside the blocks whose scheme no override changes, by name.

    Raises:
        LlmqatError: if there are none; or if all layers of the model, or all experts of a block, must have one grid.
    """
    modules = dict(model.named_modules())
    planned = [layer for layer in plan(model, scheme, overrides).quantized if not layer.role and layer.scheme == scheme]
    if fused_experts(model) or any(layer.transposed for layer in planned):
        raise LlmqatError(
            f"bits cannot be chosen by layer for {type(model).__name__}: its experts, or all of its layers, need one "
            "grid; give --bits, and --override for other layers"
        )
    if not planned:
        raise LlmqatError("overrides give all layers their bits, and leave none to choose; leave average_bits out")
    layers = ((layer.name, modules[layer.name]) for layer in planned)
    return {name: module for name, module in layers if isinstance(module, nn.Linear)}


def patterns(names: Sequence[str]) -> list[str]:
    """Regular expressions for exactly these layers: one for those that differ in the number of their block alone."""
    numbers: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in names:
        found = re.match(r"(.*?\.)(\d+)(\..*)", name)
        before, number, after = found.groups() if found else (name, "", "")
        numbers[before, after].append(number)
    return [
        f"^{re.escape(before)}({'|'.join(own)}){re.escape(after)}$" if after else f"^{re.escape(before)}$"
        for (before, after), own in numbers.items()
    ]
