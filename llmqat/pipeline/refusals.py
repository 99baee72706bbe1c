"""Refuse what a run could not carry out to its end, before any work."""

import torch
from transformers import PreTrainedModel

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.models.coverage import CoverageReport
from llmqat.models.patcher import check_smoothable
from llmqat.pipeline.measure_baselines import check_baselines, check_linear
from llmqat.processes import is_first, process_count


def check_asked(recipe: Recipe, train: bool) -> None:
    """Refuse what a recipe asks for and this installation cannot do.

    Raises:
        LlmqatError: naming it, and the remedy.
    """
    check_low_memory(recipe, train)
    if is_first():
        check_baselines(recipe)


def check_plan(model: PreTrainedModel, recipe: Recipe, coverage: CoverageReport) -> None:
    """Refuse what a recipe asks for and the float model does not allow, its layers planned.

    Raises:
        LlmqatError: naming it, and the remedy.
    """
    if recipe.init.smooth is not None:
        check_smoothable(model)
    if recipe.eval.other_tools:
        check_linear(model, coverage.schemes)


def check_device(recipe: Recipe, device: torch.device) -> None:
    """Refuse what the device that computes cannot.

    Raises:
        LlmqatError: naming it, and the remedy.
    """
    if device.type == "mps" and recipe.quant.act_static:
        raise LlmqatError(
            "static activations are observed in float64, which mps does not have; leave --act-static out, or add "
            "--device cpu"
        )


def check_low_memory(recipe: Recipe, train: bool) -> None:
    """Refuse what a run cannot do whose weights stay in their files.

    Raises:
        LlmqatError: naming it, and the remedy.
    """
    if not recipe.low_memory:
        return
    if train and recipe.train.mode == "full":
        raise LlmqatError("--low-memory leaves the weights in their files: train --train lora or scales, not full")
    if recipe.eval.other_tools:
        raise LlmqatError("--baselines loads the whole float model: leave it out, or --low-memory")
    if train and recipe.eval.control:
        raise LlmqatError("--control trains a copy of the float model in memory: leave it out, or --low-memory")
    if recipe.init.smooth is not None:
        raise LlmqatError("SmoothQuant changes all weights of the float model: leave out --smooth, or --low-memory")
    if recipe.quant.average_bits is not None:
        raise LlmqatError(
            "--average-bits takes gradients through all of the float model: leave out --low-memory, or choose bits "
            "where the model fits, and go on from its recipe.yaml with --recipe"
        )
    if process_count() > 1:
        raise LlmqatError(
            f"--low-memory runs in one process, and there are {process_count()}; start it without launcher"
        )
