"""The notebook surface: what `import llmqat` offers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat import config as config_module
from llmqat.algorithms.activation_ranges import follow_activations, observe_activations
from llmqat.config import TrainConfig
from llmqat.data.corpus import load_corpus
from llmqat.data.tokens import blocks, encode, sequences
from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed as load
from llmqat.formats.verify import Verification, verify
from llmqat.formats.writer import save_packed as pack
from llmqat.machine import environment
from llmqat.metrics.memory import peak_memory
from llmqat.metrics.perplexity import Windows, evaluate, windows
from llmqat.metrics.published import scored_windows
from llmqat.metrics.throughput import Throughput, throughput
from llmqat.models.coverage import CoverageReport
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.loading import load_tokenizer
from llmqat.models.pair import load_float
from llmqat.models.patcher import convert, prepare, quantized_layers, smooth
from llmqat.report.page.render import write_page
from llmqat.report.plan import Inspection
from llmqat.report.plan import inspect as inspect_recipe
from llmqat.report.scoreboard import scoreboard
from llmqat.train.loop import TrainResult, fit
from llmqat.train.modes import add_lora, select_trainable

__all__ = [
    "CoverageReport",
    "FloatCopy",
    "FloatView",
    "Inspection",
    "Throughput",
    "TrainResult",
    "Verification",
    "Windows",
    "add_lora",
    "blocks",
    "convert",
    "encode",
    "environment",
    "evaluate",
    "finetune",
    "follow_activations",
    "inspect",
    "load",
    "load_corpus",
    "load_float",
    "load_tokenizer",
    "observe_activations",
    "pack",
    "peak_memory",
    "perplexity",
    "prepare",
    "scoreboard",
    "scored_windows",
    "sequences",
    "smooth",
    "throughput",
    "verify",
    "windows",
    "write_page",
]


def inspect(model: str = "llama", **sections: Mapping[str, Any]) -> Inspection:
    """The dry run, to print: every Linear, quantized or not and why, predicted size and memory.

    Args:
        model: Hub id, local directory, or llama.
        sections: of a recipe, such as ``quant={"bits": 3}, train={"mode": "lora"}``.

    Returns:
        the plan: layers, bytes of the file, bytes of memory for training (activations not counted).

    Raises:
        LlmqatError: if a section is wrong, the model cannot be found, or a group size does not divide.
    """
    return inspect_recipe(config_module.from_dict({"model": model, **sections}))


def finetune(
    model: nn.Module,
    tokens: Tensor,
    held_out: Tensor,
    *,
    mode: str = "full",
    teacher: PreTrainedModel | str | None = None,
    seed: int = 0,
    output: str | Path | None = None,
    options: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train a prepared model in place, and leave it in the state with the least held-out loss.

    Args:
        model: prepared by `llmqat.prepare`; for LoRA, the result of `llmqat.add_lora`.
        tokens: training ids ``(sequences, length)``, or ids and labels of conversations, see `llmqat.sequences`.
        held_out: ids of either kind, that choose the best state.
        mode: full, lora or scales.
        teacher: the float model to distil from; "self" for the float model inside a LoRA or scales model prepared with
            ``keep_float=True``; None trains by cross-entropy.
        seed: order of the sequences.
        output: directory for checkpoints; None keeps none.
        options: fields of the recipe's ``train`` section, such as ``{"max_steps": 100, "lr": 0.02}``.

    Returns:
        steps, tokens, seconds, losses by step, and the share of codes that training changed.

    Raises:
        LlmqatError: if an option is wrong, a loss is not finite, or the run was interrupted.
    """
    recipe = config_module.from_dict({"train": {**(options or {}), "mode": mode}})
    config: TrainConfig = config_module.resolve(recipe, sum(p.numel() for p in model.parameters())).train
    if not quantized_layers(model):
        raise LlmqatError("no layer of this model is quantized; call llmqat.prepare before finetune")
    select_trainable(model, mode, config.lr_scale > 0)
    view = _teacher(model, teacher)
    directory = None if output is None else Path(output)
    return fit(model, tokens, held_out, config, mode=mode, teacher=view, seed=seed, directory=directory)


def _teacher(model: nn.Module, teacher: Any) -> FloatCopy | FloatView | None:
    if isinstance(teacher, nn.Module):
        return FloatCopy(teacher)
    if teacher is None or isinstance(teacher, FloatCopy | FloatView):
        return teacher
    if isinstance(teacher, str) and teacher == "self":
        return FloatView(model)
    raise LlmqatError(f"teacher must be a model, a FloatCopy, a FloatView, 'self' or None; got {teacher!r}")


def perplexity(model: nn.Module, tokens: Tensor, window: int = 2048) -> float:
    """Perplexity of `model` on a stream of ids, by the GPTQ protocol: windows without overlap, the tail dropped.

    Args:
        model: float, prepared or packed.
        tokens: ids ``(length,)``, with BOS where you want one.
        window: tokens per window.

    Returns:
        the exponential of the mean over windows of the mean cross-entropy in nats.

    Raises:
        LlmqatError: if the stream is shorter than one window, or the loss is not finite.
    """
    with torch.no_grad():
        return evaluate(model, Windows(blocks(tokens, window, "evaluation"), "none")).perplexity
