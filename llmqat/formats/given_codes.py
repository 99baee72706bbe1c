"""Start from the codes and scales of a packed model, of whatever tool: nothing is quantized anew.

Training needs a weight behind each code, its latent. That of the float model is taken where it has this code; where the
packed model has another one (rounded up what is nearer below, say), the latent is the point next to the float weight
that still has the code, a little inside: training can take the code back by a small step, if that is better, and a
latent in the middle of its code could not move within the steps that a fine-tuning has.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from llmqat.algorithms.compensation import take_latent
from llmqat.algorithms.gptq_model import GptqSettings, stow
from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed, quantization_of
from llmqat.formats.skeleton import skeleton
from llmqat.formats.weights import tensor_headers
from llmqat.models.foreign import local_directory
from llmqat.models.patcher import OnGrid, float_parameters, quantized_layers
from llmqat.nn.packed_linear import PackedLinear, packed_layers
from llmqat.quant.affine import holds_exactly
from llmqat.quant.fake_quant import codes_of
from llmqat.quant.grid import Grid, Latent
from llmqat.quant.interval_ends import inside_intervals
from llmqat.scheme import QuantScheme

INSIDE = 1 / 16  # of a code: how far from the end of its interval a latent is put
# Float parts of a packed model differ from those of its float model by the rounding to 16 bits at most.
SAME = 2**-6


def grids_in(directory: str | Path) -> dict[str, QuantScheme]:
    """The scheme of each layer of a packed model, by name.

    Raises:
        LlmqatError: see `skeleton`.
    """
    path = local_directory(directory)
    model = skeleton(path, quantization_of(path), tensor_headers(path), None)
    return {name: layer.scheme for name, layer in packed_layers(model).items()}


@torch.no_grad()
def latent_of(weight: Tensor, codes: Tensor, grid: Grid) -> Tensor:
    """The latent next to a float weight that has given codes, ``(out, in)`` float32.

    Args:
        weight: ``(out, in)``.
        codes: ``(out, in)``.
        grid: of the layer.

    Raises:
        LlmqatError: if the codes are not on the grid.
    """
    latent = inside_intervals(weight.float(), codes.float(), grid.stored(), INSIDE)
    # A group of zeros has a scale of any kind, and its latents no use.
    latent = torch.where(latent.isfinite(), latent, weight.float())
    if not torch.equal(codes_of(Latent(latent), grid), codes):
        raise LlmqatError("codes that no weight has on this grid")
    return latent


@torch.no_grad()
def take_codes(model: PreTrainedModel, directory: str | Path, settings: GptqSettings) -> None:
    """Put the codes and scales of a packed model in the place of those of a prepared one, in place.

    Args:
        model: prepared on the grids of the packed model (`grids_in`), from the float model it was made of.
        directory: of the packed model.
        settings: whether the float weight is to stay, and what changes it apart; where that is kept.

    Raises:
        LlmqatError: if a layer or a float part is another one there, or codes are not on their grid.
    """
    packed = load_packed(directory, native=False, mapped=True)
    layers = packed_layers(packed)
    check_float_parts(model, packed, directory)
    own_layers = quantized_layers(model)
    for on_grid in own_layers:
        theirs, own = layers.get(on_grid.name), on_grid.layer.scheme
        if theirs is None or replace(theirs.scheme, scale_dtype=own.scale_dtype) != own:
            raise LlmqatError(f"{directory} has {on_grid.name} on another grid, or float; give the grid that it has")
    own_dtype = own_layers[0].layer.storage_dtype
    scales = [layers[on_grid.name].weight_scale for on_grid in own_layers]
    dtype = own_dtype if all(holds_exactly(own_dtype, scale) for scale in scales) else scales[0].dtype
    for on_grid in own_layers:
        on_grid.layer.storage_dtype = dtype
        _take_layer(on_grid, layers[on_grid.name], settings)


def _take_layer(on_grid: OnGrid, theirs: PackedLinear, settings: GptqSettings) -> None:
    layer, (codes, scale, zero_point) = on_grid.layer, theirs.unpack()
    if layer.scale.dtype.itemsize == 2:  # kept as it is stored, until it trains
        layer.scale.data = layer.scale.data.to(layer.storage_dtype)
    device = layer.scale.device
    layer.set_grid(scale.to(device), None if zero_point is None else zero_point.to(device))
    weight = layer.weight.detach().to(layer.compute_dtype)
    if not torch.equal(layer.stored_scale().to(scale), scale):
        raise LlmqatError(f"{on_grid.name}: its scales are not all {layer.scheme.scale_dtype}; give no --scale-dtype")
    try:
        latent = latent_of(weight, codes.to(device), layer.grid).to(weight.dtype)
    except LlmqatError as error:
        raise LlmqatError(f"{on_grid.name}: {error}; pack the model again") from error
    take_latent(layer, latent, settings.keep_float)
    stow(layer, settings)
    layer.holds_float &= settings.keep_float
    on_grid.release()


def check_float_parts(model: PreTrainedModel, packed: PreTrainedModel, directory: str | Path) -> None:
    """Norms, embeddings and biases must be those of the packed model: codes mean something with their own alone.

    Raises:
        LlmqatError: naming the first that differs by more than rounding.
    """
    theirs = dict(packed.named_parameters()) | dict(packed.named_buffers())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for parameter in float_parameters(model):
        name = names[id(parameter)]
        other = theirs.get(name)
        if other is None or other.shape != parameter.shape or _differs(parameter.detach().float(), other.float()):
            raise LlmqatError(
                f"{directory} has another {name} than the float model: it was made of another one, trained, or its "
                "weights were scaled (as AWQ and SmoothQuant do); give the float model it was made of"
            )


def _differs(own: Tensor, other: Tensor) -> bool:
    return bool(((own - other).abs() > SAME * own.abs().max()).any())
