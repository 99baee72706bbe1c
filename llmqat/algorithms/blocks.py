"""Walk a model block by block, collecting the inputs of layers on the already quantized prefix.

One block's activations and one pass's Hessians are in memory at a time. Inside a block the layers are taken in the
order in which they run, those that read the same tensor together (q, k, v; then o; then gate, up; then down). Experts
come last, all of them together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from llmqat.algorithms.block_calls import Arguments, CallRecorder, Returned, Stop, is_constant, sharing
from llmqat.algorithms.stand_ins import StandIns
from llmqat.errors import LlmqatError
from llmqat.nn.experts import SplitExperts
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.full_float32 import full_float32
from llmqat.team import ALONE, Team

# An expert's layer that saw fewer calibration tokens than this many for each of its inputs keeps round-to-nearest.
# On the MLPs of blocks 1 and 4 of the bundled Llama (4 bits, groups of 32, stdlib text) GPTQ's output error on other
# tokens is 0.8 to 2.2 times that of round-to-nearest with half a token for each input, 0.4 to 1.04 times with two, and
# 0.3 to 0.83 times with four.
LEAST_TOKENS_PER_INPUT = 2
# Hessians of several experts are collected in one pass over the calibration data, up to this many bytes of them.
HESSIAN_BYTES = 4 << 30
# Rows of a Hessian that are summed together, at least: 192 to 512 take the same time for 576 to 2,048 inputs.
LEAST_STRIPE = 192
# Projections of an expert that read the same tensor, in running order.
EXPERT_STAGES = (("gate_proj", "up_proj"), ("down_proj",))


def check_batches(batches: list[Tensor]) -> None:
    """Refuse to calibrate on nothing, or on batches of several shapes.

    Raises:
        LlmqatError: if there are no batches, or their shapes differ.
    """
    if not batches or len({batch.shape for batch in batches}) != 1:
        raise LlmqatError("calibration needs at least one batch, and all batches of one shape (batch, length)")


@dataclass
class BlockInputs:
    """The inputs of a block: its hidden states for every calibration batch, and its other arguments.

    Attributes:
        hidden: a tensor per batch; of several processes, for the batches in the share of this one. One that has none
            holds the first, to see how a block runs.
        arguments: of this block and of those after it, which may differ in them, by sliding and full attention for
            example: a list for each batch, or one for all where batches share them.
        count: batches of all processes.
        team: the processes.
        done: blocks before this one.
        in_a_row: whether each layer runs once, and a run may end where nothing more is to be seen.
    """

    hidden: list[Tensor]
    arguments: list[list[Arguments]]
    count: int
    team: Team = ALONE
    done: int = 0
    in_a_row: ClassVar[bool] = True

    @classmethod
    @torch.no_grad()
    def capture(
        cls, model: nn.Module, blocks: Sequence[nn.Module], batches: list[Tensor], team: Team = ALONE
    ) -> "BlockInputs":
        """Run the model up to its first block, leaving the blocks themselves out; for the first two batches past all of
        them, and for the others too if those differ. `batches`: token ids ``(batch, length)``, all of one shape.

        Raises:
            LlmqatError: see `CallRecorder.all`.
        """
        check_batches(batches)
        inputs, recorder, constant = cls([], [], len(batches), team), CallRecorder(model, blocks), True
        device = next(model.parameters()).device
        for number, batch in enumerate(team.share(batches) or batches[:1]):
            ids = batch.to(device)
            if number < 2 or not constant:
                hidden, calls = recorder.all(ids)
                if number:
                    constant = constant and all(map(is_constant, calls, inputs.arguments[0]))
                    calls = list(map(sharing, calls, inputs.arguments[0]))
                if not number or not constant:
                    inputs.arguments.append(calls)
            else:
                hidden, _ = recorder.first(ids)
            inputs.hidden.append(hidden)
        return inputs

    @property
    def tokens(self) -> int:
        """Calibration tokens of all processes."""
        return self.count * self.hidden[0].shape[:-1].numel()

    @torch.no_grad()
    def run(self, block: nn.Module, batch: int, stand_ins: StandIns | None = None) -> Tensor:
        """The block's output for one batch. Blocks return a tensor, or a tuple that opens with one."""
        return self.outputs(block, batch, stand_ins)[0]

    def outputs(self, block: nn.Module, batch: int, stand_ins: StandIns | None = None) -> tuple[Any, ...]:
        """All that the block returns for one batch, the output first; differentiable."""
        calls = self.arguments[batch if len(self.arguments) > 1 else 0]
        with nullcontext() if stand_ins is None else stand_ins.standing_in(batch):
            output = calls[0].call(block, self.hidden[batch])
        return tuple(output) if isinstance(output, tuple | list) else (output,)

    @torch.no_grad()
    def advance(self, block: nn.Module, stand_ins: StandIns | None = None) -> None:
        """Make the block's outputs the inputs of the next."""
        for batch in range(len(self.hidden)):
            self.hidden[batch], *others = self.outputs(block, batch, stand_ins)
            self._hand_on(batch, others)
            if stand_ins is not None:
                stand_ins.forget(batch)
        for calls in self.arguments:
            del calls[0]
        self.done += 1

    def _hand_on(self, batch: int, others: list[Any]) -> None:
        """Put what a block returned beside the hidden states in its place among the arguments of later blocks."""
        returned = {Returned(self.done, item): value for item, value in enumerate(others, start=1)}
        if returned and len(self.arguments) > batch:
            calls = self.arguments[batch]
            calls[1:] = [
                call.map(lambda value: returned.get(value, value) if isinstance(value, Returned) else value)
                for call in calls[1:]
            ]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put `model` in evaluation mode until the ``with`` ends, also by an error; then back into the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def layers_of(block: nn.Module) -> dict[str, FakeQuantLinear]:
    """The layers of a block that are on a grid, by their paths in it."""
    return {path: module for path, module in block.named_modules() if isinstance(module, FakeQuantLinear)}


@contextmanager
def input_hooks(layers: dict[str, FakeQuantLinear], record: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``record(name, input)`` before each forward of `layers`."""
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: record(name, args[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stages_of(block: nn.Module, inputs: BlockInputs, layers: dict[str, FakeQuantLinear]) -> list[list[str]]:
    """Names of `layers` in the order of their first runs, those that read the same tensor (quantized alike) in one
    stage."""
    stages: list[tuple[Tensor, list[str]]] = []

    def record(name: str, x: Tensor) -> None:
        if any(name in names for _, names in stages):
            return
        for seen, names in stages:
            if seen is x and layers[names[0]].scheme.inputs == layers[name].scheme.inputs:
                names.append(name)
                return
        stages.append((x, [name]))

    with input_hooks(layers, record):
        inputs.run(block, 0)
    return [names for _, names in stages]


def passes_of(block: nn.Module, inputs: BlockInputs, layers: dict[str, FakeQuantLinear]) -> list[list[list[str]]]:
    """The stages of a block, sorted into the passes over the calibration data that collect their Hessians.

    A stage has a pass of its own, except that all experts share one: they run side by side, each on its own tokens. Of
    blocks that are not in a row, each pass over which is one of the whole model, all other stages share one, too.
    """
    experts = {f"{name}.": module for name, module in block.named_modules() if isinstance(module, SplitExperts)}
    plain = {name: layer for name, layer in layers.items() if not name.startswith(tuple(experts))}
    stages = stages_of(block, inputs, plain)
    passes = [[names] for names in stages] if inputs.in_a_row or not stages else [stages]
    for prefix, module in experts.items():
        for projections in EXPERT_STAGES:
            own: dict[tuple[int, str], list[str]] = {}
            for expert in range(len(module)):
                for name in (f"{prefix}{expert}.{projection}" for projection in projections):
                    if name in layers:  # not kept float
                        own.setdefault((expert, layers[name].scheme.inputs), []).append(name)
            rows = list(own.values())
            size = max(1, HESSIAN_BYTES // (4 * layers[rows[0][0]].in_features ** 2)) if rows else 1
            passes += [rows[start : start + size] for start in range(0, len(rows), size)]
    return passes


class Statistics(NamedTuple):
    """The Hessian of a layer, and what it was computed from.

    Attributes:
        H: ``2/n X X^T``, ``(in, in)`` float32.
        tokens: n, how many inputs ``X`` reached the layer.
        enough: whether GPTQ may use it: all calibration tokens reached the layer, or at least `LEAST_TOKENS_PER_INPUT`
            for each of its inputs.
    """

    H: Tensor
    tokens: int
    enough: bool


@full_float32()
def hessians_of(
    block: nn.Module, inputs: BlockInputs, layers: dict[str, FakeQuantLinear], stand_ins: StandIns | None = None
) -> dict[str, Statistics]:
    """The Hessian of each of `layers` over all tokens that reach it (quantized, if it quantizes its input).

    Args:
        block: whose layers they are.
        inputs: of the block.
        layers: by their paths in the block, one for each stage.
        stand_ins: for finished parts of the block; they keep of this pass what the next ones need.

    Of several processes each runs its share of the batches, and sums its share of each Hessian's rows over all batches,
    in their order: the sums are those of one process, to the bit.
    """
    sums = {n: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for n, m in layers.items()}
    tokens, team, device = dict.fromkeys(layers, 0), inputs.team, next(iter(sums.values())).device
    for first in range(0, inputs.count, team.count):
        own = first // team.count if first + team.index < inputs.count else None
        seen = [] if own is None else inputs_of(layers, block, inputs, own, stand_ins)
        # One batch after the other, as one process would: sums of floats depend on the order.
        for owner in range(min(team.count, inputs.count - first)):
            for name, x in team.tensors_of(owner, seen, device):
                x = layers[name].quantized_input(x.flatten(0, -2).float())
                _add_square(sums[name], x, team)
                tokens[name] += len(x)
    for H in sums.values():
        _bring_together(H, team)
    least = {name: min(inputs.tokens, LEAST_TOKENS_PER_INPUT * layer.in_features) for name, layer in layers.items()}
    return {
        n: Statistics(_mirrored(H).div_(max(1, tokens[n])), tokens[n], tokens[n] >= least[n]) for n, H in sums.items()
    }


def inputs_of(
    layers: dict[str, FakeQuantLinear],
    block: nn.Module,
    inputs: BlockInputs,
    batch: int,
    stand_ins: StandIns | None = None,
) -> list[tuple[str, Tensor]]:
    """Run one batch through a block, as far as the last of `layers`; returns the inputs of each call, in running
    order."""
    seen: list[tuple[str, Tensor]] = []
    waiting = set(layers)

    def record(name: str, x: Tensor) -> None:
        if stand_ins is not None:
            stand_ins.keep(name, batch, x)
        seen.append((name, x))
        waiting.discard(name)
        if not waiting and inputs.in_a_row:
            raise Stop

    with input_hooks(layers, record):
        try:
            inputs.run(block, batch, stand_ins)
        except Stop:
            pass
    return seen


def _stripes(size: int) -> Iterator[slice]:
    """Slices over the rows of a Hessian: wide enough for fast products, and not so wide that half the work is lost."""
    step = max(LEAST_STRIPE, size // 8)
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def _add_square(H: Tensor, x: Tensor, team: Team = ALONE) -> None:
    """Add ``2 x^T x`` to those stripes of `H` that are this process's share, from the diagonal on: it is symmetric."""
    for rows in team.share(_stripes(len(H))):
        H[rows, rows.start :].addmm_(x[:, rows].T, x[:, rows.start :], alpha=2.0)


def _bring_together(H: Tensor, team: Team) -> None:
    """Fill in the stripes of `H` that other processes have summed."""
    for index, rows in enumerate(_stripes(len(H)) if team.count > 1 else ()):
        H[rows] = team.tensors_of(team.owner(index), [("", H[rows])], H.device)[0][1]


def _mirrored(H: Tensor) -> Tensor:
    """`H`, with what `_add_square` left out filled in."""
    for rows in _stripes(len(H)):
        H[rows.stop :, rows] = H[rows, rows.stop :].T
    return H
