"""The state that an interrupted run left in its output directory, and whether another may go on from it.

The checkpoint holds a record of what the run reads: its recipe, and hashes of its tokens, weights and tokenizer. The
key of the run is the hash of that record; measurements and training states carry the key, and belong to nothing else.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.files import read_sealed_json, replacing, sealed_json
from llmqat.metrics.perplexity import Perplexity
from llmqat.processes import process_count
from llmqat.progress import log
from llmqat.train.checkpoint import REMEDY

FORMAT = 2
INPUTS, MEASURED = "inputs.json", "measured.json"
# The directory may have moved; how a step is cut into batches may change with the machines (see `check_same_step`), and
# what is kept in memory with the memory there is.
MAY_DIFFER = (
    "output",
    "device",
    "low_memory",
    "train.gradient_checkpointing",
    "train.compile",
    "train.batch_size",
    "train.accumulation",
)
# What a run without training does not read: it may be trained later.
TRAINING_ONLY = ("training tokens", "validation tokens")


class Record:
    """The inputs of a run: recipe, and hashes by name; and the device that computes, which may be another on resume."""

    def __init__(self, recipe: Recipe, hashes: dict[str, str], device: str = "cpu") -> None:
        self.recipe, self.hashes, self.device = flattened(recipe.to_dict()), hashes, device

    @property
    def key(self) -> str:
        """Names the run: equal for runs whose measurements are equal."""
        recipe = {key: value for key, value in self.recipe.items() if key not in MAY_DIFFER}
        hashes = {name: value for name, value in self.hashes.items() if name not in TRAINING_ONLY}
        return hashlib.sha256(json.dumps([recipe, hashes], sort_keys=True).encode()).hexdigest()

    def write(self, checkpoint: Path) -> None:
        """Keep the record for a resume."""
        with replacing(checkpoint) as scratch:
            values = {"format": FORMAT, "recipe": self.recipe, "hashes": self.hashes, "device": self.device}
            (scratch / INPUTS).write_text(sealed_json(values))

    def check(self, checkpoint: Path) -> bool:
        """Whether there is a record to go on from, which then is of the same run.

        Raises:
            LlmqatError: naming the first difference; or if the record is damaged.
        """
        saved = read_record(checkpoint)
        if saved is None:
            return False
        check_same_values(saved["recipe"], self.recipe, checkpoint / INPUTS)
        for name, value in self.hashes.items():
            if saved["hashes"].get(name, value if name in TRAINING_ONLY else None) != value:
                raise LlmqatError(
                    f"--resume: the {name} are not those that the run in {checkpoint.parent} began with; give it the "
                    f"same dataset, model and tokenizer, or {REMEDY}"
                )
        before = str(saved.get("device", self.device))
        if before.partition(":")[0] != self.device.partition(":")[0]:
            log(
                f"this run was on {before}, and goes on on {self.device}, where sums round otherwise: its last "
                "bits will not be those of a run on one device"
            )
        self.hashes = {**saved["hashes"], **self.hashes}
        return True


def read_record(checkpoint: Path) -> dict[str, Any] | None:
    """The recipe by dotted key, and the hashes, that `Record.write` kept; None where no run was begun.

    Raises:
        LlmqatError: if it is damaged, or of another version.
    """
    path = checkpoint / INPUTS
    saved = read_sealed_json(path, REMEDY)
    if saved is not None and saved.get("format") != FORMAT:
        raise LlmqatError(
            f"{path} has format {saved.get('format')}, and this llmqat reads {FORMAT}; go on with the version that "
            f"wrote it, or {REMEDY}"
        )
    return saved


def check_same_values(saved: dict[str, Any], asked: dict[str, Any], path: Path) -> None:
    """Values of a recipe by dotted key must be those saved in `path`, but for `MAY_DIFFER`.

    Raises:
        LlmqatError: naming the first difference.
    """
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


def flattened(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested recipe values by dotted key."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key != "overrides":
            result.update(flattened(value, f"{prefix}{key}."))
        else:
            result[prefix + key] = value
    return result


def read_measurements(checkpoint: Path, run: str) -> dict[str, Perplexity]:
    """Scores by variant of the model, as `write_measurements` left them; empty if it did not.

    Raises:
        LlmqatError: if they are damaged, or of another run than that with key `run`.
    """
    path = checkpoint / MEASURED
    saved = read_sealed_json(path, REMEDY)
    if saved is None:
        return {}
    if saved.get("run") != run:
        raise LlmqatError(f"{path} holds measurements of other inputs than those of this run; {REMEDY}")
    return _scores_from(saved["perplexity"])


def _scores_from(saved: dict[str, dict[str, Any]]) -> dict[str, Perplexity]:
    """Scores by name, from plain values."""
    scores = {}
    for name, values in saved.items():
        targets, also = values.pop("targets"), values.pop("also", None)
        scores[name] = Perplexity(
            np.array(values.pop("losses")),
            targets=targets and tuple(targets),
            also=also and _scores_from(also),
            **values,
        )
    return scores


def _plain(scores: dict[str, Perplexity]) -> dict[str, Any]:
    """Plain values of scores by name."""
    return {
        name: {**vars(score), "losses": score.losses.tolist(), "also": score.also and _plain(score.also)}
        for name, score in scores.items()
    }


def write_measurements(checkpoint: Path, run: str, scores: dict[str, Perplexity]) -> None:
    """Remember what was measured, to the bit, for a resume of the run with key `run`."""
    with replacing(checkpoint) as scratch:
        (scratch / MEASURED).write_text(sealed_json({"run": run, "perplexity": _plain(scores)}))


def check_measured(scores: dict[str, Perplexity], variants: list[str], checkpoint: Path) -> None:
    """A trained state tells nothing of the model before training: its `variants` must have been measured.

    Raises:
        LlmqatError: if one is missing.
    """
    missing = [variant for variant in variants if variant not in scores]
    if missing:
        raise LlmqatError(
            f"{checkpoint / MEASURED} lacks the row {missing[0]}, which cannot be measured after training; {REMEDY}"
        )
