"""Walk a model block by block, collecting what layers see on the already quantized prefix.

One block's activations and one pass's Hessians are in memory at a time. Inside a block the layers are taken in the
order in which they run, those that read the same tensor together (q, k, v; then o; then gate, up; then down). Experts
come last, all of them together.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from llmqat.algorithms.gptq import check_hessian, gptq
from llmqat.errors import LlmqatError
from llmqat.nn.experts import SplitExperts
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.progress import track
from llmqat.quant.affine import choose_scale, dequantize, quantize
from llmqat.quant.fake_quant import codes_of
from llmqat.quant.grid import Grid, Latent

# An expert's layer that saw fewer calibration tokens than this many for each of its inputs keeps round-to-nearest.
# On the MLPs of blocks 1 and 4 of the bundled Llama (4 bits, groups of 32, stdlib text) GPTQ's output error on other
# tokens is 0.8 to 2.2 times that of round-to-nearest with half a token for each input, 0.4 to 1.04 times with two, and
# 0.3 to 0.83 times with four.
LEAST_TOKENS = 2
# Hessians of several experts are collected in one pass over the calibration data, up to this many bytes of them.
HESSIAN_BYTES = 4 << 30
# Projections of an expert that read the same tensor, in running order.
EXPERT_STAGES = (("gate_proj", "up_proj"), ("down_proj",))


class LayerError(NamedTuple):
    """Relative output error ``||(W - W_hat) X||^2 / ||W X||^2`` of one layer under both initializations; `gptq` is None
    where the layer saw too few calibration tokens, and round-to-nearest was kept."""

    layer: str
    rtn: float
    gptq: float | None


class Saved(Protocol):
    """Finished blocks by index, e.g. `llmqat.train.checkpoint.SavedBlocks`: an interrupted run goes on from them."""

    def get(self, index: int) -> dict[str, Any] | None:
        """The values that `put` kept for a block, or None."""
        ...

    def put(self, index: int, state: dict[str, Any]) -> None:
        """Keep the state of a finished block."""
        ...


def check_batches(batches: list[Tensor]) -> None:
    """Refuse to calibrate on nothing, or on batches of several shapes.

    Raises:
        LlmqatError: if there are no batches, or their shapes differ.
    """
    if not batches or len({batch.shape for batch in batches}) != 1:
        raise LlmqatError("calibration needs at least one batch, and all batches of one shape (batch, length)")


class _Stop(Exception):
    """Raised by a hook once it has what it came for."""


@dataclass
class BlockInputs:
    """The inputs of a block: its hidden states for every calibration batch, and its other arguments.

    Attributes:
        hidden: a tensor per batch.
        arguments: positional (after the hidden states) and keyword arguments of this block and of those after it.
            Blocks of one model may differ in them, by sliding and full attention for example; batches share them.
    """

    hidden: list[Tensor]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]

    @classmethod
    @torch.no_grad()
    def capture(cls, model: nn.Module, blocks: Sequence[nn.Module], batches: list[Tensor]) -> "BlockInputs":
        """Run the model up to its first block, and for the first batch past all of them, leaving the blocks themselves
        out. `batches`: token ids ``(batch, length)``, all of one shape."""
        check_batches(batches)
        inputs = cls([], [])

        def record(index: int, *args: Any, **kwargs: Any) -> Tensor:
            hidden: Tensor = args[0] if args else kwargs.pop("hidden_states")
            if index == 0:
                inputs.hidden.append(hidden)
            if len(inputs.hidden) == 1:
                inputs.arguments.append((args[1:], kwargs))
            if len(inputs.hidden) > 1 or index == len(blocks) - 1:
                raise _Stop
            return hidden

        device = next(model.parameters()).device
        with ExitStack() as stack:
            for index, block in enumerate(blocks):
                block.forward = partial(record, index)
                stack.callback(delattr, block, "forward")
            for batch in batches:
                try:
                    model(input_ids=batch.to(device), use_cache=False)
                except _Stop:
                    pass
        return inputs

    def only(self, batch: int) -> "BlockInputs":
        """The inputs of one batch."""
        return BlockInputs([self.hidden[batch]], self.arguments[:1])

    @torch.no_grad()
    def run(self, block: nn.Module) -> Iterator[Tensor]:
        """The block's output for each batch. Blocks return a tensor, or a tuple that opens with one."""
        args, kwargs = self.arguments[0]
        for hidden in self.hidden:
            output = block(hidden, *args, **kwargs)
            yield output[0] if isinstance(output, tuple) else output

    def advance(self, block: nn.Module) -> None:
        """Make the block's outputs the inputs of the next."""
        for index, output in enumerate(self.run(block)):
            self.hidden[index] = output
        del self.arguments[0]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in evaluation mode; its own mode again afterwards, also after an error."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def input_hooks(layers: dict[str, FakeQuantLinear], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call ``see(name, input)`` before each forward of `layers`."""
    handles = [
        layer.register_forward_pre_hook(lambda _, args, name=name: see(name, args[0])) for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stages_of(block: nn.Module, inputs: BlockInputs, layers: dict[str, FakeQuantLinear]) -> list[list[str]]:
    """Names of `layers` in running order, those that read the same tensor (quantized alike) in one stage."""
    stages: list[tuple[Tensor, list[str]]] = []

    def see(name: str, x: Tensor) -> None:
        for seen, names in stages:
            if seen is x and layers[names[0]].scheme.act_bits == layers[name].scheme.act_bits:
                names.append(name)
                return
        stages.append((x, [name]))

    with input_hooks(layers, see):
        next(inputs.only(0).run(block))
    return [names for _, names in stages]


def passes_of(block: nn.Module, inputs: BlockInputs, layers: dict[str, FakeQuantLinear]) -> list[list[list[str]]]:
    """The stages of a block, sorted into the passes over the calibration data that collect their Hessians.

    A stage has a pass of its own, except that all experts share one: they run side by side, each on its own tokens.
    """
    experts = {f"{name}.": module for name, module in block.named_modules() if isinstance(module, SplitExperts)}
    plain = {name: layer for name, layer in layers.items() if not name.startswith(tuple(experts))}
    passes = [[names] for names in stages_of(block, inputs, plain)]
    for prefix, module in experts.items():
        for projections in EXPERT_STAGES:
            stages: dict[tuple[int, int | None], list[str]] = {}
            for expert in range(len(module)):
                for name in (f"{prefix}{expert}.{projection}" for projection in projections):
                    if name in layers:  # not kept float
                        stages.setdefault((expert, layers[name].scheme.act_bits), []).append(name)
            rows = list(stages.values())
            size = max(1, HESSIAN_BYTES // (4 * layers[rows[0][0]].in_features ** 2)) if rows else 1
            passes += [rows[start : start + size] for start in range(0, len(rows), size)]
    return passes


class Statistics(NamedTuple):
    """``H = 2/n X X^T``, ``(in, in)`` float32, of the `tokens` = n inputs ``X`` of a layer; and whether they are
    `enough`: all that there were, or the least number for layers that see a part of them."""

    H: Tensor
    tokens: int
    enough: bool


def hessians_of(block: nn.Module, inputs: BlockInputs, layers: dict[str, FakeQuantLinear]) -> dict[str, Statistics]:
    """The Hessian of each of `layers` over all tokens that reach it (quantized, if it quantizes its input)."""
    sums = {n: torch.zeros(m.in_features, m.in_features, device=m.weight.device) for n, m in layers.items()}
    tokens = dict.fromkeys(layers, 0)
    waiting: set[str] = set()

    def see(name: str, x: Tensor) -> None:
        x = layers[name].quantized_input(x.flatten(0, -2).float())
        sums[name].addmm_(x.T, x, alpha=2.0)
        tokens[name] += len(x)
        waiting.discard(name)
        if not waiting:
            raise _Stop

    with input_hooks(layers, see):
        for batch in range(len(inputs.hidden)):
            waiting.update(layers)
            try:
                next(inputs.only(batch).run(block))
            except _Stop:
                pass
    there_were = sum(hidden.shape[:-1].numel() for hidden in inputs.hidden)
    least = {name: min(there_were, LEAST_TOKENS * layer.in_features) for name, layer in layers.items()}
    return {n: Statistics(H.div_(max(1, tokens[n])), tokens[n], tokens[n] >= least[n]) for n, H in sums.items()}


class _Forward(nn.Module):
    """A model as one block: token ids in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, **arguments: Any) -> Any:
        """The model's output."""
        return self.model(input_ids=ids.to(next(self.model.parameters()).device), **arguments)


def output_error(weight: Tensor, w_hat: Tensor, H: Tensor) -> float:
    """``||(W - W_hat) X||^2 / ||W X||^2``, from ``H`` alone."""
    difference = weight - w_hat.float()
    return float(((difference @ H) * difference).sum() / ((weight @ H) * weight).sum().clamp(min=1e-30))


def _quantize_layer(layer: FakeQuantLinear, seen: Statistics, damp: float, keep_float: bool, name: str) -> LayerError:
    """Put GPTQ's grid and latents in place, if `seen` is enough; report the error against round-to-nearest."""
    weight, scheme, H = layer.weight.detach(), layer.scheme, seen.H
    check_hessian(H, name)
    s, z = choose_scale(weight, scheme, layer.storage_dtype)
    rtn = output_error(weight, dequantize(quantize(weight, s, z, scheme), s, z, scheme), H)
    if not seen.enough:
        return LayerError(name, rtn, None)
    result = gptq(weight, H, scheme, layer.storage_dtype, damp, name)
    w_hat = dequantize(result.codes, result.scale, result.zero_point, scheme)
    error = LayerError(name, rtn, output_error(weight, w_hat, H))
    layer.set_grid(result.scale, result.zero_point)
    if keep_float:
        layer.compensation = compensation_of(weight, result.latent, layer.grid)
    else:
        layer.weight.data = result.latent
    return error


@torch.no_grad()
def compensation_of(weight: Tensor, latent: Tensor, grid: Grid) -> Tensor:
    """The difference that gives `weight` the codes of `latent` when added, both ``(out, in)``.

    ``latent - weight`` in the storage dtype, which halves its memory; where that rounding would change a code, the
    difference to the middle of the code's interval instead, and float32 throughout if even that is too coarse.
    """
    codes = codes_of(Latent(latent), grid)
    middle = grid.stored().dequantize(codes).float()
    for dtype in (grid.storage_dtype, torch.float32):
        difference = (latent - weight).to(dtype)
        moved = codes_of(Latent(weight, difference), grid) != codes
        difference = torch.where(moved, (middle - weight).to(dtype), difference)
        if torch.equal(codes_of(Latent(weight, difference), grid), codes):
            break
    return difference


def gptq_block(
    block: nn.Module, inputs: BlockInputs, damp: float, keep_float: bool = False, name: str = "block"
) -> list[LayerError]:
    """GPTQ for every `FakeQuantLinear` of one block, in place; then make its outputs the inputs of the next.

    Args:
        block: a prepared block.
        inputs: what it reads on the quantized prefix.
        damp: damping of the Hessian, as a fraction of its mean diagonal.
        keep_float: leave `weight` as it was and keep GPTQ's change apart, so that the float model can still be run.
        name: of the block, for messages.

    Raises:
        LlmqatError: if a Hessian cannot be used.
    """
    errors = []
    layers = {path: m for path, m in block.named_modules() if isinstance(m, FakeQuantLinear)}
    for stages in passes_of(block, inputs, layers) if layers else []:
        # One Hessian serves all layers of a stage: they read the same tensor.
        seen = hessians_of(block, inputs, {names[0]: layers[names[0]] for names in stages})
        for first, layer in ((names[0], layer) for names in stages for layer in names):
            errors.append(_quantize_layer(layers[layer], seen[first], damp, keep_float, f"{name} {layer}"))
    inputs.advance(block)
    return errors


@torch.no_grad()
def gptq_head(
    model: nn.Module, head: FakeQuantLinear, batches: list[Tensor], damp: float, keep_float: bool
) -> LayerError:
    """GPTQ for the output head, in place, after the blocks: its Hessian is that of the final hidden states."""
    with evaluating(model):
        seen = hessians_of(_Forward(model), BlockInputs(batches, [((), {"use_cache": False})]), {"": head})[""]
        return _quantize_layer(head, seen, damp, keep_float, "output head")


def gptq_model(
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: list[Tensor],
    damp: float,
    keep_float: bool,
    saved: Saved | None = None,
) -> list[LayerError]:
    """GPTQ for every `FakeQuantLinear` inside `blocks`, in place; see `gptq_block`.

    Args:
        model: the prepared model; its float forward feeds the first block.
        blocks: its blocks, in order.
        batches: token ids ``(batch, length)``, all of one shape.
        damp: damping of the Hessian.
        keep_float: keep GPTQ's change apart from the weight.
        saved: blocks finished by an earlier run of the same arguments; those of this run are added.

    Raises:
        LlmqatError: if there are no batches, or a Hessian cannot be used.
    """
    errors: list[LayerError] = []
    with evaluating(model):
        inputs = BlockInputs.capture(model, list(blocks), batches)
        for index, block in track(enumerate(blocks), "GPTQ", len(blocks)):
            finished = None if saved is None else saved.get(index)
            if finished is not None and finished["keep_float"] == keep_float:
                block.load_state_dict(finished["state"], strict=False)
                errors += [LayerError(*error) for error in finished["errors"]]
                inputs.advance(block)
                continue
            before = _marks(block)
            own = gptq_block(block, inputs, damp, keep_float, f"block {index}")
            errors += own
            if saved is not None:
                state, rows = _changed(block, before), [tuple(error) for error in own]
                saved.put(index, {"state": state, "errors": rows, "keep_float": keep_float})
    return errors


def _marks(block: nn.Module) -> dict[str, tuple[int, int]]:
    """Where each tensor of `block` lies, and how often it was written to."""
    return {name: (tensor.data_ptr(), tensor._version) for name, tensor in block.state_dict().items()}


def _changed(block: nn.Module, before: dict[str, tuple[int, int]]) -> dict[str, Tensor]:
    """The tensors of `block` that are not what they were at `_marks`."""
    after = _marks(block)
    return {name: tensor for name, tensor in block.state_dict().items() if after[name] != before.get(name)}
