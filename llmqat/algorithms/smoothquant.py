"""SmoothQuant (Xiao et al., arXiv 2211.10438, section 4): move outliers from activations into weights, exactly.

    s_j = max|X_j|^alpha / max|W_:,j|^(1 - alpha)          written /= s          W *= s

Here ``s`` is rounded to a power of two, so that folding changes no mantissa: the float model computes the same
numbers in float32, bfloat16 and float16 alike.

``auto`` searches alpha for every site, as AWQ does for its scales (arXiv 2306.00978, section 3.2), with the grid and
the activation quantizer that the readers will have:

    argmin over s of  sum over the readers of  || Q(W s) Q_act(x / s) - W x ||^2          s = 1 included
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llmqat.algorithms.blocks import eval_mode
from llmqat.algorithms.fold import Fold, apply_checked
from llmqat.errors import LlmqatError, shortened_list
from llmqat.progress import track
from llmqat.quant.affine import fake_quantize_input, on_grid, quotient
from llmqat.scheme import QuantScheme

AUTO = "auto"
ALPHAS = tuple(step / 10 for step in range(11))
PROBE_TOKENS = 64
# Tokens of each site's input that the search keeps: the bytes of as many rows of the weights that read it.
SAMPLE_TOKENS = 512
# An expert that saw fewer calibration tokens stays as it is: where one of them happens to have a small value, the next
# has a large one. On MLPs of the bundled Llama (W8A8 and W4A8, up_proj -> down_proj, alpha 0.5, stdlib text, with and
# without injected outliers) down_proj's output error on other tokens is at most 1.5 times that with the scales of 4,096
# tokens when they come from 32, 1.8 times with 16, 3.1 times with 4, 104 times with one.
LEAST_EXPERT_TOKENS = 32


class Smoothed(NamedTuple):
    """The change that smoothing made at one site.

    Attributes:
        alpha: None where the site was left alone.
        change: relative change of the float logits, by all experts of a block together.
        errors: relative output error of the readers on their grid, before and after; None where nothing was searched.
    """

    alpha: float | None
    change: float = 0.0
    errors: tuple[float, float] | None = None


class Inputs(NamedTuple):
    """Inputs of the readers of a site: the largest magnitudes ``(inputs,)``, some tokens ``(tokens, inputs)``."""

    absmax: Tensor
    sample: Tensor


def smoothing_scale(activation_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Powers of two next to ``activation_absmax^alpha / weight_absmax^(1 - alpha)``; 1 where unused."""
    s = activation_absmax.float().pow(alpha) / weight_absmax.float().clamp(min=1e-5).pow(1 - alpha)
    return torch.where(activation_absmax > 0, s.clamp(min=1e-5).log2().round().exp2(), torch.ones_like(s))


@torch.no_grad()
def observe_readers(
    model: nn.Module, modules: Sequence[nn.Module], batches: list[Tensor], tokens: int
) -> list[Inputs | None]:
    """Inputs of each of `modules` over token `batches` ``(batch, length)``, about `tokens` of them drawn by chance.

    Returns:
        None for an expert that saw fewer than `LEAST_EXPERT_TOKENS`.
    """
    absmaxes: list[list[Tensor]] = [[] for _ in modules]
    samples: list[list[Tensor]] = [[] for _ in modules]
    seen = [0] * len(modules)
    least = min(LEAST_EXPERT_TOKENS, sum(batch.numel() for batch in batches))
    generator = torch.Generator()
    share = -(-tokens // len(batches))

    def record(index: int, x: Tensor) -> None:
        x = x.detach().flatten(0, -2)
        seen[index] += len(x)
        absmaxes[index] = [torch.stack([*absmaxes[index], x.abs().amax(0)]).amax(0)]
        chosen = torch.randperm(len(x), generator=generator.manual_seed(len(samples[index])))[:share]
        samples[index].append(x[chosen.to(x.device)].float())

    device = next(model.parameters()).device
    with ExitStack() as stack:
        for i, module in enumerate(modules):
            stack.callback(module.register_forward_pre_hook(lambda _, args, i=i: record(i, args[0])).remove)
        for batch in track(batches, "SmoothQuant", len(batches)):
            model(input_ids=batch.to(device), use_cache=False)
    return [
        Inputs(absmax[0], torch.cat(sample)) if count >= least else None
        for absmax, sample, count in zip(absmaxes, samples, seen, strict=True)
    ]


def activations_on_grid(x: Tensor, scheme: QuantScheme) -> Tensor:
    """`x` ``(tokens, in)`` as a layer of `scheme` multiplies it; a static range is that of `x` itself."""
    return fake_quantize_input(x, scheme, quotient(x.abs().amax().view(1), 127) if scheme.inputs == "static" else None)


def readers_error(fold: Fold, x: Tensor, s: Tensor, dtype: torch.dtype) -> float:
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
        w = weight.float()
        x_hat = activations_on_grid(smooth_x, scheme)
        y = linear(x, w)
        error += float((linear(x_hat, on_grid(w * columns, scheme, dtype)) - y).square().sum())
        total += float(y.square().sum())
    return error / total


def search_alpha(fold: Fold, inputs: Inputs, dtype: torch.dtype) -> tuple[float | None, Tensor, tuple[float, float]]:
    """The alpha of `ALPHAS`, or None for off, with the least `readers_error`; its scale; the errors off and there."""
    absmax, weight_absmax = fold.largest(inputs.absmax), fold.weight_absmax()
    best: float | None = None
    best_s = torch.ones_like(weight_absmax)
    off = least = readers_error(fold, inputs.sample, best_s, dtype)
    for alpha in ALPHAS:
        s = fold.representable(smoothing_scale(absmax, weight_absmax, alpha), dtype)
        error = readers_error(fold, inputs.sample, s, dtype)
        if error < least:
            best, best_s, least = alpha, s, error
    return best, best_s, (off, least)


def chosen_alpha(
    fold: Fold, inputs: Inputs | None, alpha: float | str, dtype: torch.dtype
) -> tuple[float | None, Tensor, tuple[float, float] | None]:
    """Alpha (None leaves the site alone), its scale, and the errors where it was searched, as in `search_alpha`.

    An expert without enough `inputs` is left alone.
    """
    if inputs is None:
        return None, torch.ones(()), None
    if isinstance(alpha, str):
        return search_alpha(fold, inputs, dtype)
    s = smoothing_scale(fold.largest(inputs.absmax), fold.weight_absmax(), alpha)
    return alpha, fold.representable(s, dtype), None


def site_of(name: str) -> str:
    """The site of writer `name`: all experts of a block share one, with ``*`` for their number."""
    return re.sub(r"(?<=\.experts\.)\d+", "*", name)


@torch.no_grad()
def smooth_model(
    model: nn.Module, folds: Sequence[Fold], batches: list[Tensor], alpha: float | str, dtype: torch.dtype
) -> dict[str, Smoothed]:
    """Fold every site, comparing float logits before and after each, all experts of a block at once.

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
    with eval_mode(model):
        sampled = SAMPLE_TOKENS if alpha == AUTO else 0
        observed = observe_readers(model, [fold.observed for fold in folds], batches, sampled)
        probe = batches[0][:1, :PROBE_TOKENS].to(next(model.parameters()).device)
        before = model(input_ids=probe, use_cache=False).logits
        pairs = track(zip(folds, observed, strict=True), "folding", len(folds))
        for site, group in groupby(pairs, key=lambda pair: site_of(pair[0].name)):
            choices = {fold: chosen_alpha(fold, inputs, alpha, dtype) for fold, inputs in group}
            scales = {fold: s for fold, (chosen, s, _) in choices.items() if chosen is not None}
            change = apply_checked(model, site, scales, probe, before) if scales else 0.0
            for fold, (chosen, _, errors) in choices.items():
                results[fold.name] = Smoothed(chosen, change, errors)
    return results


def smoothing_summary(results: Mapping[str, Smoothed]) -> str:
    """The result of smoothing in a few lines: alpha by kind of site, blocks in order, and output errors."""
    change = max((done.change for done in results.values()), default=0.0)
    smoothed = sum(done.alpha is not None for done in results.values())
    lines = [
        f"smoothed {smoothed} of {len(results)} sites; float logits changed by at most {change:.1e} of the largest"
    ]
    kinds: dict[str, list[Smoothed]] = {}
    for name, done in results.items():
        if done.errors is not None:
            kinds.setdefault(re.split(r"\.\d+\.", site_of(name), maxsplit=1)[-1], []).append(done)
    for kind, choices in kinds.items():
        alphas = ["off" if done.alpha is None else f"{done.alpha:g}" for done in choices]
        by_block = "alpha by block: " + " ".join(alphas)
        by_alpha = "experts by alpha: " + ", ".join(f"{alpha}: {n}" for alpha, n in sorted(Counter(alphas).items()))
        off, least = (sum(done.errors[i] for done in choices if done.errors) / len(choices) for i in range(2))
        chosen = by_alpha if "*" in kind else by_block
        lines.append(f"  {kind}: output error {off:.2e} -> {least:.2e} on average; {chosen}")
    bare = [name for name, done in results.items() if done.alpha is None and done.errors is None]
    if bare:
        lines.append(
            f"  left as they are, for fewer than {LEAST_EXPERT_TOKENS} calibration tokens: {shortened_list(bare)}"
        )
    return "\n".join(lines)
