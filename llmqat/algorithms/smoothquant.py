"""SmoothQuant (Xiao et al., arXiv 2211.10438, section 4): move outliers from activations into weights, exactly.

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)          norm.weight /= s          W *= s

Here ``s`` is rounded to a power of two, so that folding changes no mantissa: the float model computes the same
numbers in float32, bfloat16 and float16 alike.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from llmqat.algorithms.calibration import evaluating
from llmqat.errors import LlmqatError
from llmqat.progress import track

# Power-of-two folding commutes with rounding, so logits differ by underflow and by nothing else.
TOLERANCE = 1e-5
PROBE_TOKENS = 64


def smoothing_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Powers of two next to ``activation_absmax^alpha / weight_absmax^(1 - alpha)``, ``(in,)``; 1 where unused."""
    s = activation_absmax.float().pow(alpha) / weight_absmax.float().clamp(min=1e-5).pow(1 - alpha)
    return torch.where(activation_absmax > 0, s.clamp(min=1e-5).log2().round().exp2(), torch.ones_like(s))


@torch.no_grad()
def input_absmax(model: nn.Module, layers: Sequence[nn.Module], batches: list[Tensor]) -> list[Tensor]:
    """Largest magnitude of every input channel of each of `layers`, ``(in,)``, over token `batches`."""
    maxima: dict[int, Tensor] = {}

    def see(index: int, x: Tensor) -> None:
        absmax = x.detach().abs().flatten(0, -2).amax(0)
        maxima[index] = absmax if index not in maxima else torch.maximum(maxima[index], absmax)

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for i, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(lambda _, args, i=i: see(i, args[0])).remove)
        for batch in track(batches, "SmoothQuant", len(batches)):
            model(input_ids=batch.to(device), use_cache=False)
    return [maxima[i] for i in range(len(layers))]


@torch.no_grad()
def fold(norm: nn.Module, linears: Sequence[nn.Module], s: Tensor) -> None:
    """Divide the norm's weight (and bias) by ``s (in,)``, and multiply the columns of `linears` by it."""
    for parameter in norm.parameters():
        parameter.div_(s.to(parameter.dtype))
    for linear in linears:
        assert isinstance(linear.weight, Tensor)
        linear.weight.mul_(s.to(linear.weight.dtype))


@torch.no_grad()
def smooth_model(
    model: nn.Module, sites: Sequence[tuple[str, Sequence[str]]], batches: list[Tensor], alpha: float
) -> dict[str, float]:
    """Fold every site, comparing float logits before and after each.

    Args:
        model: the float model, before it is prepared.
        sites: path of a norm -> paths of all the linears that read it.
        batches: token ids ``(batch, length)``.
        alpha: 0 leaves outliers in the activations, 1 moves all of them into the weights.

    Returns:
        relative change of the logits by site.

    Raises:
        LlmqatError: if alpha is out of range, or folding a site changed the float model; that site is put back.
    """
    if not 0.0 <= alpha <= 1.0:
        raise LlmqatError(f"the smoothing strength alpha must lie between 0 and 1, got {alpha:g}")
    with evaluating(model):
        return _smooth(model, sites, batches, alpha)


def _smooth(
    model: nn.Module, sites: Sequence[tuple[str, Sequence[str]]], batches: list[Tensor], alpha: float
) -> dict[str, float]:
    """`smooth_model` in evaluation mode."""
    first_readers = [model.get_submodule(linears[0]) for _, linears in sites]
    absmax = input_absmax(model, first_readers, batches)
    probe = batches[0][:1, :PROBE_TOKENS].to(next(model.parameters()).device)
    before = model(input_ids=probe, use_cache=False).logits
    changes = {}
    for (norm_path, linear_paths), activation_absmax in zip(sites, absmax, strict=True):
        norm, linears = model.get_submodule(norm_path), [model.get_submodule(path) for path in linear_paths]
        weight_absmax = torch.cat([p.abs() for linear in linears for p in linear.parameters() if p.ndim == 2]).amax(0)
        s = smoothing_scale(activation_absmax, weight_absmax, alpha)
        fold(norm, linears, s)
        after = model(input_ids=probe, use_cache=False).logits
        change = float((after - before).abs().max() / before.abs().max())
        if not change <= TOLERANCE:
            fold(norm, linears, 1 / s)
            raise LlmqatError(
                f"smoothing {norm_path} changed the float logits by {change:.1e} of their largest (limit "
                f"{TOLERANCE:.0e}): "
                "something else reads that norm; leave --smooth out for this model, or mend its row in architectures.py"
            )
        changes[norm_path] = change
    return changes
