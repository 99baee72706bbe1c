"""A forecast in words: the table of `inspect`, and the line with which a run begins."""

from functools import cache, partial

import torch

from llmqat.config import Recipe
from llmqat.forecast.advice import fitting
from llmqat.forecast.speed import flops_per_second
from llmqat.forecast.stages import Forecast, forecast, is_predictable
from llmqat.machine import available_memory
from llmqat.models.coverage import total_parameters
from llmqat.models.loading import load_empty
from llmqat.models.planning import checked_plan, resolve_for
from llmqat.progress import duration, log

# A run of a smaller model shows how long it takes before a forecast of it is made.
LEAST_PARAMETERS = 50_000_000


def seconds_of(predicted: Forecast, device: torch.device) -> list[float]:
    """Seconds of each stage on a device whose speed is measured now."""
    return predicted.seconds(cache(partial(flops_per_second, device)))


def table(predicted: Forecast, device: torch.device) -> list[str]:
    """The stages with their time and memory, a line each, and what there is of both."""
    seconds, available = seconds_of(predicted, device), available_memory(device)
    rows = zip(predicted.stages, seconds, strict=True)
    lines = [f"  {stage.name:<32} {duration(s):>12} {stage.bytes / 1e9:>8.2f} GB" for stage, s in rows]
    total = f"  {'in all':<32} {duration(sum(seconds)):>12} {predicted.worst.bytes / 1e9:>8.2f} GB"
    return [*lines, f"{total} of {available / 1e9:.2f} GB available on {device}"]


def announce(asked: Recipe, device: torch.device, train: bool) -> None:
    """Say what a run will take, before any work of it; and if that is more than there is, which flags make it fit."""
    model, stored = load_empty(asked.model)
    if total_parameters(model) < LEAST_PARAMETERS or not is_predictable(model):
        return
    recipe, quant = resolve_for(model, asked), asked.quant
    coverage = checked_plan(model, recipe.scheme(), quant.overrides, quant.lm_head_bits, quant.min_coverage)
    predict = partial(forecast, model=model, coverage=coverage, stored=stored, train=train)
    predicted, available = predict(recipe), available_memory(device)
    peak = f"{predicted.worst.bytes / 1e9:.1f} GB of memory, in {predicted.worst.name}"
    log(f"this run takes about {duration(sum(seconds_of(predicted, device)))} and {peak}, on {device}")
    if predicted.worst.bytes <= available:
        return
    fit = fitting(recipe, predicted, predict, available)
    has = f"there are {available / 1e9:.1f} GB"
    if fit is None:
        log(f"{has}, and no flag makes it fit: take a larger machine, or a smaller model")
    else:
        log(f"{has}: add {' '.join(fit.flags)}, which takes {fit.forecast.worst.bytes / 1e9:.1f} GB")
