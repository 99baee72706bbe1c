"""How fast the float and the packed model of a run read and write text."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmqat.config import EvalConfig, Resolved
from llmqat.formats.reader import load_packed
from llmqat.machine import return_freed_memory
from llmqat.metrics.throughput import Throughput, throughput
from llmqat.models.loading import load_float


def speeds(recipe: Resolved, directory: Path, device: torch.device) -> dict[str, Throughput]:
    """Throughput of both, each loaded anew in its stored dtype, by variant; one is gone before the other comes."""
    loads: dict[str, Callable[[], Any]] = {
        "float": partial(load_float, recipe.model),
        "packed": partial(load_packed, directory),
    }
    return {variant: _speed(load, recipe.eval, device) for variant, load in loads.items()}


def _speed(load: Callable[[], Any], config: EvalConfig, device: torch.device) -> Throughput:
    return_freed_memory()
    return throughput(load().to(device), config.prompt, config.new_tokens, config.repeats)
