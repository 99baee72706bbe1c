"""What an interrupted run left in its output directory, and whether another may go on from it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from llmqat import config as config_module
from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.files import discard_partial, locked, make_directory, replacing
from llmqat.metrics.perplexity import Perplexity
from llmqat.processes import is_first, process_count

RECIPE, REPORT, CHECKPOINT, MEASURED, ADAPTER = "recipe.yaml", "report.json", "checkpoint", "measured.json", "adapter"

# The directory may have moved; how a step is cut into batches may change with the machines (see `check_same_step`).
MAY_DIFFER = ("output", "train.batch_size", "train.accumulation")


def check_output(directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to damage a finished run or foreign files, and find out early whether the directory can be written.

    Files that a killed run had not finished are removed.

    Raises:
        LlmqatError: if it holds a run or anything else and neither flag allows to go on, or cannot be written.
    """
    make_directory(directory)
    discard_partial(directory)
    if any(directory.iterdir()) and not (resume or overwrite):
        raise LlmqatError(
            f"output {directory} is not empty; choose another --output, go on with --resume, or add --overwrite"
        )
    with replacing(directory):
        pass


@contextmanager
def claimed(directory: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """`check_output`, and no other process in the directory meanwhile; only the first of several processes writes.

    Raises:
        LlmqatError: see `check_output`; or if another process is writing there.
    """
    if not is_first():
        yield
        return
    make_directory(directory)
    with locked(directory):
        check_output(directory, resume, overwrite)
        yield


def check_same_recipe(path: Path, recipe: Recipe) -> None:
    """A run is resumed with the recipe it was started with, but in any directory and any number of processes.

    Raises:
        LlmqatError: naming the first difference.
    """
    saved, asked = flat(config_module.from_yaml(path).to_dict()), flat(recipe.to_dict())
    different = [key for key in asked if asked[key] != saved.get(key) and key not in MAY_DIFFER]
    if different:
        raise LlmqatError(
            f"--resume continues the recipe in {path}, but {different[0]} is {asked[different[0]]!r} now and was "
            f"{saved.get(different[0])!r}; give the same options, or start again with --overwrite"
        )


def check_same_step(result: dict[str, Any], recipe: Recipe) -> None:
    """However many processes share it, a training step takes as many sequences as those before it.

    Args:
        result: of the saved training state.
        recipe: of this run.

    Raises:
        LlmqatError: if it would not.
    """
    config = recipe.train
    sequences = config.batch_size * config.accumulation * process_count()
    if result["sequences"] != result["steps"] * sequences:
        before = result["sequences"] // result["steps"]
        raise LlmqatError(
            f"--resume: a step took {before} sequences, and would take {sequences} now; the product of "
            "processes, --batch-size and --accumulation must stay the same"
        )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested recipe values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "overrides":
            result.update(flat(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def read_measurements(directory: Path) -> tuple[dict[str, Perplexity], dict[str, Any]]:
    """Rows of the scoreboard and GPTQ's layer errors, as `write_measurements` left them; empty if it did not."""
    path = directory / MEASURED
    if not path.exists():
        return {}, {}
    saved: dict[str, Any] = json.loads(path.read_text())
    rows = {}
    for row, values in saved["perplexity"].items():
        targets = values.pop("targets")
        rows[row] = Perplexity(np.array(values.pop("losses")), targets=targets and tuple(targets), **values)
    return rows, {layer: tuple(errors) for layer, errors in saved["errors"].items()}


def write_measurements(directory: Path, rows: dict[str, Perplexity], errors: dict[str, Any]) -> None:
    """Remember what was measured, to the bit, for a resume."""
    perplexity = {row: {**asdict(p), "losses": p.losses.tolist()} for row, p in rows.items()}
    with replacing(directory) as scratch:
        (scratch / MEASURED).write_text(json.dumps({"perplexity": perplexity, "errors": errors}))
