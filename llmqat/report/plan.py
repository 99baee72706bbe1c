"""`llmqat inspect`: what a run would do, before any work is done."""

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from llmqat.config import Recipe, Resolved, log_cut
from llmqat.devices import find_device
from llmqat.errors import LlmqatError
from llmqat.forecast.ending import packed_bytes
from llmqat.forecast.stages import MASTER, Forecast, forecast, is_predictable
from llmqat.forecast.words import table
from llmqat.formats.compressed_tensors import readers
from llmqat.formats.export.check import not_run
from llmqat.formats.serve_with import plan_to_serve, resolve_to_serve
from llmqat.models.architectures import blocks_in_words, known_architecture, whole_runs
from llmqat.models.coverage import CoverageReport, by_expert
from llmqat.models.dequantized import in_words
from llmqat.models.experts import experts_in_words
from llmqat.models.loading import load_empty, stored_format
from llmqat.serve.covered import decoding_in_words

ADAM, GRADIENT = 8, 4  # bytes per parameter: two float32 moments, float32 gradient


@dataclass(frozen=True)
class Inspection:
    """The plan of a run.

    Attributes:
        recipe: fully resolved.
        coverage: layer by layer.
        packed_bytes: predicted size of the packed file.
        float_bytes: size of the float model in its stored dtype.
        training_bytes: predicted memory for weights, gradients, optimizer and teacher, activations not counted.
        family: what is known of the model's family, or was found by looking at the model.
        stored_format: of its weights, where they are dequantized to begin with; see `llmqat.models.loading`.
        decoding: what of the packed model runs natively on a CPU.
        tied: whether the output head is the embedding.
        forecast: time and memory of each stage; None where they depend on the data.
    """

    recipe: Resolved
    coverage: CoverageReport
    packed_bytes: int
    float_bytes: int
    training_bytes: int
    family: str
    stored_format: str
    decoding: str
    tied: bool
    forecast: Forecast | None

    def __str__(self) -> str:
        """The plan as a table in plain text."""
        layers = [
            f"  {name:<40} {layer.shape[0]:>7} x {layer.shape[1]:<7} {layer.scheme or f'float: {layer.reason}'}"
            for name, layer in by_expert(self.coverage.layers)
        ]
        return "\n".join(
            [
                f"{self.recipe.model}: {self.coverage.total_parameters / 1e6:.2f} M parameters",
                *([in_words(self.stored_format)] if self.stored_format else []),
                *layers,
                self.coverage.summary(),
                f"output head tied to the embedding: {'yes' if self.tied else 'no'}",
                f"key-value cache: {'int8, a scale per token and head' if self.recipe.quant.kv_bits else 'float'}",
                f"packed as compressed-tensors: {readers(self.coverage)}",
                *([f"note: {note}"] if (note := not_run(self.coverage.layers, self.recipe.quant.kv_bits)) else []),
                f"model family {self.family}",
                f"decoding on a CPU: {self.decoding}",
                f"predicted file: {self.packed_bytes / 1e6:.2f} MB (float: {self.float_bytes / 1e6:.2f} MB)",
                *self._prediction(),
            ]
        )

    def _prediction(self) -> list[str]:
        """Time and memory, stage by stage; or the sum of what is known, and why it is not more."""
        mode = self.recipe.train.mode
        if self.forecast is None:
            return [
                f"predicted memory for --train {mode}: {self.training_bytes / 1e9:.2f} GB, activations not counted: "
                "which experts a token goes to depends on the data, and in known families alone even shares will do"
            ]
        worst = self.forecast.worst
        return [
            f"predicted memory for --train {mode}: {worst.bytes / 1e9:.2f} GB at its peak, in {worst.name}",
            *table(self.forecast, find_device(self.recipe.device)),
        ]


def inspect(recipe: Recipe) -> Inspection:
    """Build the model without weights and plan the run.

    Raises:
        LlmqatError: if the model cannot be found, too little of it is covered, or a group size does not divide; or if
            bits are to be measured.
    """
    if recipe.quant.average_bits is not None:
        raise LlmqatError("inspect measures nothing, and --average-bits is chosen by measuring; give it --bits")
    model, stored = load_empty(recipe.model)
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    resolved = resolve_to_serve(model, recipe)
    log_cut(recipe, resolved)
    coverage = plan_to_serve(model, resolved)
    return Inspection(
        resolved,
        coverage,
        ceil(packed_bytes(model, coverage, stored, stored.itemsize)),
        parameters * stored.itemsize,
        training_bytes(resolved, coverage, parameters, stored),
        family_in_words(model),
        stored_format(recipe.model),
        decoding_in_words(model, coverage),
        bool(getattr(config.get_text_config(), "tie_word_embeddings", False)),
        forecast(resolved, model, coverage, stored) if is_predictable(model) else None,
    )


def family_in_words(model: Any) -> str:
    """Say whether GPTQ and SmoothQuant apply to a model, and how its blocks are known."""
    row, experts = known_architecture(model), experts_in_words(model)
    if row is not None:
        smooth = "and SmoothQuant apply" if row.smooth_sites else "applies, and no --smooth"
        return f"known: GPTQ {smooth}{experts and f'; {experts}'}"
    try:
        if whole := whole_runs(model):
            return f"without a row{experts and f', {experts}'}; {whole}: GPTQ runs the whole model for each of them"
        blocks = blocks_in_words(model) + (experts and f"; {experts}")
        return f"without a row, blocks {blocks}: GPTQ applies, and --smooth tries what it may scale"
    except LlmqatError as error:
        return f"without a row: {error}"


def training_bytes(recipe: Resolved, coverage: CoverageReport, parameters: int, stored: torch.dtype) -> int:
    """Weights, gradients, optimizer states and teacher; the same sums as the training modes make."""
    layers, frozen = coverage.quantized, min(MASTER, stored.itemsize)
    quantized = sum(layer.parameters for layer in layers)
    if recipe.train.mode == "full":
        teacher = frozen * parameters if recipe.train.loss == "kd" else 0
        return (MASTER + GRADIENT + ADAM) * parameters + teacher
    scales = sum(
        layer.shape[0] * (layer.shape[1] // layer.scheme.group_length(layer.shape[1]))
        for layer in layers
        if layer.scheme
    )
    compensation = quantized + 2 * scales  # see `llmqat.quant.grid.Compensation`
    if recipe.train.mode == "lora":
        trained = recipe.train.lora_r * sum(sum(layer.shape) for layer in layers)
        return frozen * parameters + compensation + (MASTER + GRADIENT + ADAM) * trained
    return frozen * parameters + compensation + (MASTER + GRADIENT + ADAM) * scales
