"""Refuse what a run could not carry out to its end, before any work."""

import torch

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.processes import process_count


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
