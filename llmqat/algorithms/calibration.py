"""Walk a model block by block, collecting what layers see on the already quantized prefix.

One block's activations and one stage's Hessians are in memory at a time. Inside a block the layers are taken in the
order in which they run, those that read the same tensor together (q, k, v; then o; then gate, up; then down).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmqat.algorithms.gptq import gptq
from llmqat.errors import LlmqatError
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.progress import track
from llmqat.quant.affine import choose_scale, dequantize, fake_quantize_activation, quantize


class LayerError(NamedTuple):
    """Relative output error ``||(W - W_hat) X||^2 / ||W X||^2`` of one layer under both initializations."""

    layer: str
    rtn: float
    gptq: float


def check_batches(batches: list[Tensor]) -> None:
    """Refuse to calibrate on nothing, or on batches of several shapes.

    Raises:
        LlmqatError: if there are no batches, or their shapes differ.
    """
    if not batches or len({batch.shape for batch in batches}) != 1:
        raise LlmqatError("calibration needs at least one batch, and all batches of one shape (batch, length)")


class _Stop(Exception):
    """Raised by a hook once it has what it came for."""


class BlockInputs:
    """Inputs of one block for every calibration batch: hidden states, and the arguments all blocks share."""

    def __init__(self, hidden: list[Tensor], arguments: dict[str, Any]) -> None:
        self.hidden, self.arguments = hidden, arguments

    @classmethod
    @torch.no_grad()
    def capture(cls, model: nn.Module, first_block: nn.Module, batches: list[Tensor]) -> "BlockInputs":
        """Run the model up to its first block. `batches`: token ids ``(batch, length)``, all of one shape."""
        check_batches(batches)
        hidden: list[Tensor] = []
        arguments: dict[str, Any] = {}

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.update(kwargs)
            raise _Stop

        device = next(model.parameters()).device
        handle = first_block.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches:
                try:
                    model(input_ids=batch.to(device), use_cache=False)
                except _Stop:
                    pass
        finally:
            handle.remove()
        return cls(hidden, arguments)

    @torch.no_grad()
    def run(self, block: nn.Module) -> Iterator[Tensor]:
        """The block's output for each batch. Blocks return a tensor, or a tuple that opens with one."""
        for hidden in self.hidden:
            output = block(hidden, **self.arguments)
            yield output[0] if isinstance(output, tuple) else output

    def advance(self, block: nn.Module) -> None:
        """Make the block's outputs the inputs of the next."""
        for index, output in enumerate(self.run(block)):
            self.hidden[index] = output


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
        next(BlockInputs(inputs.hidden[:1], inputs.arguments).run(block))
    return [names for _, names in stages]


def hessian_of(block: nn.Module, inputs: BlockInputs, layer: FakeQuantLinear) -> Tensor:
    """``H = 2/n X X^T`` over all tokens, ``(in, in)`` float32, of what `layer` reads (quantized, if it does so)."""
    H = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
    tokens = 0

    def see(_: str, x: Tensor) -> None:
        nonlocal tokens
        x = x.flatten(0, -2)
        x = x.float() if layer.scheme.act_bits is None else fake_quantize_activation(x.float())
        H.addmm_(x.T, x, alpha=2.0)
        tokens += len(x)
        raise _Stop

    with input_hooks({"": layer}, see):
        for hidden in inputs.hidden:
            try:
                next(BlockInputs([hidden], inputs.arguments).run(block))
            except _Stop:
                pass
    return H / tokens


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


def _quantize_layer(layer: FakeQuantLinear, H: Tensor, damp: float, keep_float: bool, name: str) -> LayerError:
    """Put GPTQ's grid and latents in place; report the error against round-to-nearest."""
    weight, scheme = layer.weight.detach(), layer.scheme
    s, z = choose_scale(weight, scheme, layer.scale_dtype)
    rtn = output_error(weight, dequantize(quantize(weight, s, z, scheme), s, z, scheme), H)
    result = gptq(weight, H, scheme, layer.scale_dtype, damp, name)
    w_hat = dequantize(result.codes, result.scale, result.zero_point, scheme)
    error = LayerError(name, rtn, output_error(weight, w_hat, H))
    layer.set_grid(result.scale, result.zero_point)
    if keep_float:
        layer.compensation = _compensation(layer, result.latent, result.codes, w_hat)
    else:
        layer.weight.data = result.latent
    return error


def _compensation(layer: FakeQuantLinear, latent: Tensor, codes: Tensor, w_hat: Tensor) -> Tensor:
    """``latent - weight`` in the storage dtype, which halves its memory; where that rounding would change a code, the
    difference to the middle of the code's interval instead, and float32 throughout if even that is too coarse."""
    weight = layer.weight.detach()
    for dtype in (layer.scale_dtype, torch.float32):
        layer.compensation = compensation = (latent - weight).to(dtype)
        moved = layer.codes() != codes
        layer.compensation = compensation = torch.where(moved, (w_hat.float() - weight).to(dtype), compensation)
        if torch.equal(layer.codes().float(), codes):
            break
    return compensation


@torch.no_grad()
def gptq_head(
    model: nn.Module, head: FakeQuantLinear, batches: list[Tensor], damp: float, keep_float: bool
) -> LayerError:
    """GPTQ for the output head, in place, after the blocks: its Hessian is that of the final hidden states."""
    with evaluating(model):
        H = hessian_of(_Forward(model), BlockInputs(batches, {"use_cache": False}), head)
        return _quantize_layer(head, H, damp, keep_float, "output head")


def gptq_model(
    model: nn.Module, blocks: nn.ModuleList, batches: list[Tensor], damp: float, keep_float: bool
) -> list[LayerError]:
    """GPTQ for every `FakeQuantLinear` inside `blocks`, in place.

    Args:
        model: the prepared model; its float forward feeds the first block.
        blocks: its decoder blocks, in order.
        batches: token ids ``(batch, length)``, all of one shape.
        damp: damping of the Hessian, as a fraction of its mean diagonal.
        keep_float: leave `weight` as it was and keep GPTQ's change apart, so that the float model can still be run.

    Raises:
        LlmqatError: if there are no batches, or a Hessian cannot be used.
    """
    errors = []
    with evaluating(model):
        inputs = BlockInputs.capture(model, blocks[0], batches)
        for index, block in track(enumerate(blocks), "GPTQ", len(blocks)):
            layers = {name: m for name, m in block.named_modules() if isinstance(m, FakeQuantLinear)}
            for names in stages_of(block, inputs, layers) if layers else []:
                # One Hessian serves all layers of the stage: they read the same tensor.
                H = hessian_of(block, inputs, layers[names[0]])
                for name in names:
                    errors.append(_quantize_layer(layers[name], H, damp, keep_float, f"block {index} {name}"))
            inputs.advance(block)
    return errors
