"""Run a model in another engine, in a process of its own and, where asked for, the Python of another environment."""

import json
import os
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmqat.errors import LlmqatError, shortened
from llmqat.formats.export.gguf import FILE
from llmqat.pipeline.engines import worker
from llmqat.pipeline.engines.table import ENGINES, PACKAGES
from llmqat.pipeline.passages import Passages

RANK = re.compile(r"^\[rank\d+\]: ")
ERROR_LINE = re.compile(r"\b[A-Z]\w*(Error|Exception): ")


class Ran(NamedTuple):
    """Results of an engine on some passages.

    Attributes:
        versions: of the packages that ran.
        ids: of the texts of the passages, by the engine's tokenizer.
        greedy: continuations of the prompts.
        log_probabilities: of the next tokens of each passage, ``(length - 1, vocabulary)``.
    """

    versions: dict[str, str]
    ids: list[list[int]]
    greedy: list[list[int]]
    log_probabilities: list[Tensor]


def run_engine(runtime: str, directory: Path, held_as: str, passages: Passages, python: str) -> Ran:
    """Run the model of a directory in an engine.

    Args:
        runtime: the engine, a name of `ENGINES`.
        directory: of the model.
        held_as: its format.
        passages: to run.
        python: of the environment that has the engine.

    Raises:
        LlmqatError: if the engine does not run this format, is not installed, or fails, with its own last word.
    """
    engine = ENGINES[runtime]
    if held_as not in engine.formats:
        able = ", ".join(name for name, other in ENGINES.items() if held_as in other.formats)
        raise LlmqatError(f"{runtime} runs {', '.join(engine.formats)}, and {directory} is {held_as}; choose {able}")
    job = {
        "file": runtime.replace(".", "_"),
        "modules": engine.modules(runtime, held_as),
        "directory": str(directory),
        "format": held_as,
        "gguf": FILE,
        "dtype": engine.dtype(held_as),
        **passages._asdict(),
    }
    with TemporaryDirectory() as scratch:
        (Path(scratch) / worker.JOB).write_text(json.dumps(job), "utf-8")
        _start(python, scratch, f"{runtime} cannot run {directory}")
        said = json.loads((Path(scratch) / worker.RESULT).read_text("utf-8"))
        with np.load(Path(scratch) / worker.LOG_PROBABILITIES) as file:
            found = [torch.from_numpy(file[name]) for name in file.files]
    if "missing" in said:
        raise LlmqatError(_not_installed(runtime, said["missing"], python))
    return Ran(said["versions"], said["ids"], said["greedy"], found)


def _start(python: str, scratch: str, failed: str) -> None:
    """Run the worker to its end."""
    # No folder of this package may stand in for a library there: -P keeps that of the script off the search path.
    command = [python, "-P", str(Path(worker.__file__)), scratch]
    environment: dict[str, Any] = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise LlmqatError(f"cannot start {python}: {error.strerror}; give the Python of an environment") from error
    if done.returncode:
        raise LlmqatError(f"{failed}: {_last_word(done.stderr.splitlines(), done.returncode)}")


def _last_word(lines: list[str], status: int) -> str:
    """The last exception that a process named, with what it said behind it; what came last, if there was none."""
    said = [RANK.sub("", line).strip() for line in lines if line.strip()] or ["nothing was said"]
    errors = [index for index, line in enumerate(said) if ERROR_LINE.search(line)]
    word = shortened(" ".join(said[errors[-1] :] if errors else said[-1:]))
    return word if status > 0 else f"signal {-status} ended it; its last line: {word}"


def _not_installed(runtime: str, modules: Iterable[str], python: str) -> str:
    packages = " ".join(PACKAGES.get(module, module) for module in modules)
    return (
        f"{runtime} needs packages that {python} does not have: pip install {packages}, or name the Python of an "
        "environment that has them by --runtime-python"
    )
