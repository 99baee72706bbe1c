"""The content of `details.json`, drawn on the page: curves, errors and histograms of every layer."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.metrics.perplexity import bootstrap_difference
from llmqat.models.patcher import transformers_model
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import dequantize
from llmqat.report.measured import Measured
from llmqat.report.schema import FORMAT
from llmqat.report.text import measured_on, verdict
from llmqat.scheme import QuantScheme
from llmqat.train.loop import TrainResult

NAME = "details.json"
CURVE_POINTS = 400
WEIGHT_BINS = 49  # odd, so that zero has a bin of its own
# Weights are drawn up to this many standard deviations; what lies beyond is counted in the last bins.
WEIGHT_RANGE = 4.0
# A model of experts has thousands of layers; the page holds histograms of this many at most.
HISTOGRAMS = 400


def thinned(curve: dict[int, float], points: int = CURVE_POINTS) -> list[tuple[int, float]]:
    """A curve by step as at most `points` pairs; where it has more, means of as many consecutive values."""
    pairs = sorted(curve.items())
    size = -(-len(pairs) // points)
    chunks = [pairs[start : start + size] for start in range(0, len(pairs), max(1, size))]
    return [(chunk[-1][0], sum(value for _, value in chunk) / len(chunk)) for chunk in chunks]


def curves(training: TrainResult | None) -> dict[str, Any]:
    """Losses and codes flipped by step, and the step that was kept; empty where nothing was trained."""
    if training is None:
        return {}
    return {
        "loss": thinned(training.losses),
        "held_out": thinned(training.held_out),
        "flipped": thinned(training.flipped),
        "best_step": training.best_step,
    }


def histogram(values: Tensor, limit: float) -> list[int]:
    """Counts in `WEIGHT_BINS` equal bins from ``-limit`` to ``limit``; what lies beyond counts in the last ones."""
    counts = torch.histc(values.detach().float().clamp(-limit, limit), WEIGHT_BINS, -limit, limit)
    return [int(count) for count in counts]


def layer_histograms(weight: Tensor | None, codes: Tensor, w_hat: Tensor, scheme: QuantScheme) -> dict[str, Any]:
    """Float weights and those on the grid, on one axis, and how often each code is used.

    Args:
        weight: float ``(out, in)``, or None where the float model does not hold it as such.
        codes: of the grid, ``(out, in)``.
        w_hat: dequantized ``(out, in)``.
        scheme: of the layer.
    """
    shown = w_hat if weight is None else weight
    limit = min(float(shown.abs().max()), WEIGHT_RANGE * float(shown.float().std()))
    used = torch.bincount(codes.flatten().long() - scheme.qmin, minlength=2**scheme.bits)
    return {
        "limit": limit,
        "float": None if weight is None else histogram(weight, limit),
        "grid": histogram(w_hat, limit),
        "first_code": scheme.qmin,
        "codes": used.tolist(),
    }


@torch.no_grad()
def layers(measured: Measured, packed: Mapping[str, PackedLinear], float_model: nn.Module) -> list[dict[str, Any]]:
    """Every quantized layer in model order: output errors by variant of the model, share of codes that training
    changed, and of at most `HISTOGRAMS` of them, evenly picked, the histograms.

    Args:
        measured: the run.
        packed: the layers as they are in the file, by name.
        float_model: the float model, or the model on its grid again where its masters are the float weights.
    """
    originals = dict(transformers_model(float_model).named_modules())
    changed = measured.training.layers_changed if measured.training else {}
    layer_errors = {name: result.layer_errors for name, result in measured.perplexity.items() if result.layer_errors}
    found = []
    for index, (name, layer) in enumerate(packed.items()):
        details = {
            "name": name,
            "shape": [layer.out_features, layer.in_features],
            "scheme": str(layer.scheme),
            "errors": {variant: errors[name] for variant, errors in layer_errors.items() if name in errors},
            "codes_changed": changed.get(name),
        }
        if index % -(-len(packed) // HISTOGRAMS) == 0:
            original: Any = originals.get(name)
            weight = None if original is None else getattr(original, "base_layer", original).weight.detach()
            codes, scale, zero_point = layer.unpack()
            w_hat = dequantize(codes, scale, zero_point, layer.scheme)
            details |= layer_histograms(weight, codes, w_hat, layer.scheme)
        found.append(details)
    return found


def collect(measured: Measured, found: list[dict[str, Any]]) -> dict[str, Any]:
    """All details of a run, with what was `found` by `layers`."""
    best, interval = measured.best_ptq(), None
    if best and measured.training is not None and "packed" in measured.perplexity:
        low, high = bootstrap_difference(measured.perplexity["packed"], measured.perplexity[best])
        interval = {"against": best, "low": low, "high": high}
    return {
        "format": FORMAT,
        "scheme": str(measured.recipe.scheme()),
        "verdict": verdict(measured),
        "measured_on": measured_on(measured),
        "interval": interval,
        "curves": curves(measured.training),
        "layers": found,
    }


def write(details: dict[str, Any], path: Path) -> None:
    """Write `details.json`: numbers for the page, rounded to what a picture shows."""
    path.write_text(json.dumps(_rounded(details)) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value
