"""SmoothQuant (Xiao et al., arXiv 2211.10438, section 4): move outliers from activations into weights, exactly.

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)          written /= s          W *= s

Here ``s`` is rounded to a power of two, so that folding changes no mantissa: the float model computes the same
numbers in float32, bfloat16 and float16 alike.

``auto`` searches alpha for every site, as AWQ does for its scales (arXiv 2306.00978, section 3.2), with the grid and
the activation quantizer that the readers will have:

    argmin over s of  sum over the readers of  || Q(W s) Q_act(x / s) - W x ||^2          s = 1 included
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llmqat.algorithms.calibration import evaluating
from llmqat.algorithms.fold import Fold, apply_checked
from llmqat.errors import LlmqatError
from llmqat.progress import track
from llmqat.quant.affine import choose_scale, dequantize, fake_quantize_activation, fake_quantize_static, quantize
from llmqat.scheme import QuantScheme

AUTO = "auto"
ALPHAS = tuple(step / 10 for step in range(11))
PROBE_TOKENS = 64
# Tokens of each site's input that the search keeps: about a thousandth of the bytes of the weights that read them.
SAMPLE_TOKENS = 512


class Smoothed(NamedTuple):
    """What was done at one site.

    Attributes:
        alpha: None where the site was left alone.
        change: relative change of the float logits.
        errors: relative output error of the readers on their grid, before and after; None where nothing was searched.
    """

    alpha: float | None
    change: float = 0.0
    errors: tuple[float, float] | None = None


class Inputs(NamedTuple):
    """What the readers of a site see: the largest magnitudes ``(inputs,)``, and some tokens ``(tokens, inputs)``."""

    absmax: Tensor
    sample: Tensor


def smoothing_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Powers of two next to ``activation_absmax^alpha / weight_absmax^(1 - alpha)``; 1 where unused."""
    s = activation_absmax.float().pow(alpha) / weight_absmax.float().clamp(min=1e-5).pow(1 - alpha)
    return torch.where(activation_absmax > 0, s.clamp(min=1e-5).log2().round().exp2(), torch.ones_like(s))


@torch.no_grad()
def observe(model: nn.Module, modules: Sequence[nn.Module], batches: list[Tensor], tokens: int) -> list[Inputs]:
    """Inputs of each of `modules` over token `batches` ``(batch, length)``, about `tokens` of them drawn by chance."""
    absmaxes: list[list[Tensor]] = [[] for _ in modules]
    samples: list[list[Tensor]] = [[] for _ in modules]
    generator = torch.Generator()
    share = -(-tokens // len(batches))

    def see(index: int, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        absmaxes[index] = [torch.stack([*absmaxes[index], x.abs().amax(0)]).amax(0)]
        chosen = torch.randperm(len(x), generator=generator.manual_seed(len(samples[index])))[:share]
        samples[index].append(x[chosen.to(x.device)].float())

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(lambda _, args, i=i: see(i, args[0])).remove)
        for batch in track(batches, "SmoothQuant", len(batches)):
            model(input_ids=batch.to(device), use_cache=False)
    return [Inputs(absmax[0], torch.cat(sample)) for absmax, sample in zip(absmaxes, samples, strict=True)]


def on_grid(weight: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> Tensor:
    """`weight` ``(out, in)`` rounded to nearest on the grid of `scheme`, in float32."""
    scale, zero_point = choose_scale(weight, scheme, dtype)
    return dequantize(quantize(weight, scale, zero_point, scheme), scale, zero_point, scheme).float()


def activations_on_grid(x: Tensor, scheme: QuantScheme) -> Tensor:
    """`x` ``(tokens, in)`` as a layer of `scheme` sees it; a static range is that of `x` itself."""
    if scheme.act_static:
        return fake_quantize_static(x, x.abs().amax().view(1) / 127)
    return x if scheme.act_bits is None else fake_quantize_activation(x)


def output_error(fold: Fold, x: Tensor, s: Tensor, dtype: torch.dtype) -> float:
    """``sum ||Q(W s) Q_act(x / s) - W x||^2 / sum ||W x||^2`` over the readers that will be quantized.

    Args:
        fold: not applied yet.
        x: inputs of the readers, ``(tokens, inputs)`` float32.
        s: ``(channels,)``.
        dtype: storage dtype of the scales.
    """
    columns, error, total = fold.spread(s), 0.0, 1e-30
    smooth_x = x / columns
    for weight, scheme in zip(fold.read, fold.schemes, strict=True):
        if scheme is None:
            continue
        w = weight.float().flatten(0, -2)
        seen = activations_on_grid(smooth_x, scheme)
        y = linear(x, w)
        error += float((linear(seen, on_grid(w * columns, scheme, dtype)) - y).square().sum())
        total += float(y.square().sum())
    return error / total


def search(fold: Fold, inputs: Inputs, dtype: torch.dtype) -> tuple[float | None, Tensor, tuple[float, float]]:
    """The alpha of `ALPHAS`, or None for off, with the least `output_error`; its scale; the errors off and there."""
    absmax, weight_absmax = fold.largest(inputs.absmax), fold.weight_absmax()
    best: float | None = None
    best_s = torch.ones_like(weight_absmax)
    off = least = output_error(fold, inputs.sample, best_s, dtype)
    for alpha in ALPHAS:
        s = fold.representable(smoothing_scale(absmax, weight_absmax, alpha), dtype)
        error = output_error(fold, inputs.sample, s, dtype)
        if error < least:
            best, best_s, least = alpha, s, error
    return best, best_s, (off, least)


@torch.no_grad()
def smooth_model(
    model: nn.Module, folds: Sequence[Fold], batches: list[Tensor], alpha: float | str, dtype: torch.dtype
) -> dict[str, Smoothed]:
    """Fold every site, comparing float logits before and after each.

    Args:
        model: the float model, before it is prepared.
        folds: its sites, in the order in which they are smoothed.
        batches: token ids ``(batch, length)``.
        alpha: 0 leaves outliers in the activations, 1 moves all of them into the weights; "auto" searches it by site.
        dtype: what scales and norms will be stored in.

    Returns:
        what was done, by site.

    Raises:
        LlmqatError: if alpha is out of range, a fold is not exact in the model's dtype, or it changed the float model;
            that site is put back.
    """
    if alpha != AUTO and not (isinstance(alpha, int | float) and 0.0 <= alpha <= 1.0):
        raise LlmqatError(f"the smoothing strength alpha must lie between 0 and 1, or be {AUTO}; got {alpha!r}")
    for fold in folds:
        fold.check_dtype()
    results: dict[str, Smoothed] = {}
    with evaluating(model):
        observed = observe(model, [fold.observed for fold in folds], batches, SAMPLE_TOKENS if alpha == AUTO else 0)
        probe = batches[0][:1, :PROBE_TOKENS].to(next(model.parameters()).device)
        before = model(input_ids=probe, use_cache=False).logits
        for fold, inputs in track(zip(folds, observed, strict=True), "folding", len(folds)):
            if isinstance(alpha, str):
                chosen, s, errors = search(fold, inputs, dtype)
                change = 0.0 if chosen is None else apply_checked(model, fold, s, probe, before)
                results[fold.name] = Smoothed(chosen, change, errors)
            else:
                s = smoothing_scale(fold.largest(inputs.absmax), fold.weight_absmax(), alpha)
                change = apply_checked(model, fold, fold.representable(s, dtype), probe, before)
                results[fold.name] = Smoothed(alpha, change)
    return results


def describe(results: Mapping[str, Smoothed]) -> str:
    """What was done, in a few lines: the choices by kind of site, blocks in order, and what they gained."""
    change = max((done.change for done in results.values()), default=0.0)
    smoothed = sum(done.alpha is not None for done in results.values())
    lines = [
        f"smoothed {smoothed} of {len(results)} sites; float logits changed by at most {change:.1e} of the largest"
    ]
    kinds: dict[str, list[Smoothed]] = {}
    for name, done in results.items():
        if done.errors is not None:
            kinds.setdefault(re.split(r"\.\d+\.", name, maxsplit=1)[-1], []).append(done)
    for kind, choices in kinds.items():
        alphas = " ".join("off" if done.alpha is None else f"{done.alpha:g}" for done in choices)
        off, least = (sum(done.errors[i] for done in choices if done.errors) / len(choices) for i in range(2))
        lines.append(f"  {kind}: output error {off:.2e} -> {least:.2e} on average; alpha by block: {alphas}")
    return "\n".join(lines)
