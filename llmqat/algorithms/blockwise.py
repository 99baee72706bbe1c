"""Block-wise reconstruction: train the codes and scales of a block towards the output that it has in the float model.

GPTQ makes the error of one layer small, on the inputs that this layer reads. What counts is the error behind the whole
block, and there the layers can mend each other's. After GPTQ has found a block's scales and codes, its latent weights
and scales ``theta`` are trained together through the straight-through estimator, for a few hundred steps on the
calibration data:

    min over theta of  mean over tokens t of  ||g (f_q(X_q; theta)_t - f(X)_t)||^2 / ||g f(X)_t||^2

``f`` is the float block, and ``X`` what it reads in the float model; ``X_q`` is what the block reads behind the blocks
that are quantized already, so that it learns to undo their error too (Block-AP of EfficientQAT, arXiv 2407.11062,
section 3.2). Errors count as the norm behind the block sees them: relative to each token's output, and times its gain
``g``. Else the few tokens whose outputs are many times as large as the others' have most of the say, and the few
channels that are large in all of them (`llmqat.algorithms.read_gains`). Rates count in codes, as AutoRound's do (arXiv
2309.05516, section 3): at a linear decay to zero, ``rate * steps / 2`` is how far a weight can move at most.

The latents start near the float weight, with a part of GPTQ's change: that is fitted to the calibration text, and
training from all of it fits it further, at the cost of other text. So a trained block is also kept where it is a little
worse than GPTQ's on held-out text of the same kind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor, nn

from llmqat.algorithms.blocks import BlockInputs, layers_of
from llmqat.algorithms.compensation import take_latent
from llmqat.nn.fake_quant_linear import FakeQuantLinear

HELD_OUT_EVERY = 8  # of the calibration batches one of so many chooses the best state, and does not train
GPTQ_SHARE = 0.25  # of GPTQ's change of a weight, from which the training starts
WORST = 1.1  # of GPTQ's held-out error: beyond it GPTQ's state is kept
CHECKS = 4  # of the held-out error while a block trains, the last one at its end
BETAS = (0.9, 0.95)


class Blockwise(NamedTuple):
    """How a block is reconstructed.

    Attributes:
        steps: of the optimizer, for each block.
        lr: of the latent weights, in codes a step, decaying linearly to zero.
        lr_scale: of the scales, as a fraction of the layer's median, likewise.
        sequences: in a step.
        dtype: in which a block computes while it trains; errors that are compared are computed likewise.
    """

    steps: int = 200
    lr: float = 1e-2
    lr_scale: float = 1e-3
    sequences: int = 4
    dtype: torch.dtype = torch.bfloat16


class Target(NamedTuple):
    """The outputs that a block is to have, and what counts of them.

    Attributes:
        outputs: of the float block on the float prefix, a tensor per batch.
        gain: by which an error counts in each channel, ``(channels,)``; see `llmqat.algorithms.read_gains`.
    """

    outputs: list[Tensor]
    gain: Tensor


class BlockError(NamedTuple):
    """Relative output error of a block on held-out calibration data, after GPTQ and after the reconstruction."""

    gptq: float
    blockwise: float

    @property
    def ratio(self) -> float:
        """How much of the error the reconstruction has left."""
        return self.blockwise / self.gptq if self.gptq > 0 else 1.0


def regrouped(batches: list[Tensor], sequences: int) -> list[Tensor]:
    """Token ids in batches of `sequences`; rows that fill no batch are left out."""
    rows = torch.cat(batches)
    size = min(sequences, len(rows))
    return list(rows[: len(rows) // size * size].split(size))


class Pairs:
    """Inputs of a block on the quantized prefix, and the outputs that it is to have, by batch.

    Args:
        block: that is reconstructed.
        inputs: of the block.
        target: what it is to return.
        dtype: in which the block computes.
    """

    def __init__(self, block: nn.Module, inputs: BlockInputs, target: Target, dtype: torch.dtype) -> None:
        self.block, self.inputs, self.target, self.dtype = block, inputs, target, dtype
        count = len(target.outputs)
        self.held_out = list(range(0, count, HELD_OUT_EVERY)) if count >= HELD_OUT_EVERY else []
        self.training = sorted(set(range(count)) - set(self.held_out))

    def error(self, batch: int) -> Tensor:
        """``||g (f_q(X_q)_t - f(X)_t)||^2 / ||g f(X)_t||^2``, the mean over the tokens of a batch."""
        exact, gain = self.target.outputs[batch].float(), self.target.gain
        with torch.autocast(exact.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.inputs.outputs(self.block, batch)[0]
        squares = ((output.float() - exact) * gain).square().sum(-1)
        return (squares / (exact * gain).square().sum(-1).clamp(min=1e-20)).mean()

    def draw(self, steps: int) -> Iterator[int]:
        """A batch for each of `steps`: all that train in random order, again and again; the same in every run."""
        generator, waiting = torch.Generator().manual_seed(0), list[int]()
        for _ in range(steps):
            if not waiting:
                order = torch.randperm(len(self.training), generator=generator).tolist()
                waiting = [self.training[index] for index in order]
            yield waiting.pop()

    @torch.no_grad()
    def held_out_error(self) -> float:
        """The error over the held-out batches; over all, where there are too few to hold any out."""
        return fmean(float(self.error(batch)) for batch in self.held_out or self.training)


@contextmanager
def own_latents(layers: list[FakeQuantLinear], keep_float: bool) -> Iterator[list[Tensor]]:
    """Give `layers` float32 latents of their own inside the ``with``, which may be changed; then let their weights have
    what was found.

    Args:
        layers: on their grids.
        keep_float: leave the weight as it was and keep its change apart; see `GptqSettings`.

    Yields:
        their float weights.
    """
    before = [(layer.weight, layer.scale.dtype) for layer in layers]
    for layer, (weight, _) in zip(layers, before, strict=True):
        layer.weight = nn.Parameter(weight.detach().to(layer.compute_dtype, copy=True), requires_grad=False)
        layer.scale.data = layer.scale.data.to(layer.compute_dtype)
    yield [weight.detach() for weight, _ in before]
    for layer, (weight, dtype) in zip(layers, before, strict=True):
        latent, layer.weight = layer.weight.detach(), weight
        layer.scale.data = layer.stored_scale().to(dtype)
        take_latent(layer, latent, keep_float)


@contextmanager
def _training(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients be taken of `parameters` inside the ``with``."""
    marks = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        yield
    for parameter, mark in zip(parameters, marks, strict=True):
        parameter.grad = None
        parameter.requires_grad_(mark)


def reconstruct(
    block: nn.Module, inputs: BlockInputs, target: Target, weights: list[Tensor], settings: Blockwise
) -> BlockError:
    """Train latents and scales of all layers of a block that are on a grid, in place; the best state is kept.

    Args:
        block: whose layers have `own_latents`; GPTQ's, or on the grid by rounding to nearest.
        inputs: what it reads on the quantized prefix, all batches.
        target: what it is to return.
        weights: those of its layers in the float model.
        settings: see `Blockwise`.
    """
    layers, pairs = list(layers_of(block).values()), Pairs(block, inputs, target, settings.dtype)
    trained = [layer.weight for layer in layers] + [layer.scale for layer in layers]
    steps = [float(layer.scale.detach().abs().median()) for layer in layers]
    rates = [settings.lr * step for step in steps] + [settings.lr_scale * step for step in steps]
    groups = [{"params": [parameter], "lr": rate} for parameter, rate in zip(trained, rates, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=BETAS, fused=True)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, settings.steps)
    first = found = pairs.held_out_error()
    limit = WORST * first
    best = [parameter.detach().clone() for parameter in trained]
    for layer, weight in zip(layers, weights, strict=True):
        layer.weight.data = torch.lerp(weight.to(layer.weight), layer.weight.data, GPTQ_SHARE)
    with _training(trained):
        for step, batch in enumerate(pairs.draw(settings.steps), start=1):
            # Of these alone: other parameters of the block may be marked to train later.
            gradients = torch.autograd.grad(pairs.error(batch), trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient  # none for an expert that no token reached
            optimizer.step()
            decay.step()
            if step * CHECKS % settings.steps < CHECKS:
                error = pairs.held_out_error()
                if error < limit:
                    found = limit = error
                    best = [parameter.detach().clone() for parameter in trained]
    for parameter, value in zip(trained, best, strict=True):
        parameter.data.copy_(value)
    return BlockError(first, found)
