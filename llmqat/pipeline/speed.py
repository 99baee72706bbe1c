"""How fast the float and the packed model of a run read and write text."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from llmqat.config import Resolved
from llmqat.formats.reader import load_packed
from llmqat.metrics.throughput import Throughput, throughput
from llmqat.models.loading import load_float


def speeds(recipe: Resolved, directory: Path, device: torch.device) -> dict[str, Throughput]:
    """Throughput of both, each loaded anew in its stored dtype, by variant."""
    config, found = recipe.eval, {}
    for variant, load in (("float", partial(load_float, recipe.model)), ("packed", partial(load_packed, directory))):
        model: Any = load()
        model.to(device)
        found[variant] = throughput(model, config.prompt, config.new_tokens, config.repeats)
    return found
