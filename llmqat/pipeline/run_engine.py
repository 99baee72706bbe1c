"""Run a model in another engine, in a process of its own and, where asked for, the Python of another environment."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats.export.gguf import FILE
from llmqat.pipeline.engines import run_passages
from llmqat.pipeline.engines.table import ENGINES
from llmqat.pipeline.other_python import Tool, run_in
from llmqat.pipeline.passages import Passages


class Ran(NamedTuple):
    """Results of an engine on some passages.

    Attributes:
        versions: of the packages that ran.
        ids: of the texts of the passages, by the engine's tokenizer.
        greedy: continuations of the prompts.
        tokens_s: tokens a second of the continuations, with the prompts before them, median.
        log_probabilities: of the next tokens of each passage, ``(length - 1, vocabulary)``.
    """

    versions: dict[str, str]
    ids: list[list[int]]
    greedy: list[list[int]]
    tokens_s: float
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
        "directory": str(directory),
        "format": held_as,
        "gguf": FILE,
        "dtype": engine.dtype(held_as),
        **passages._asdict(),
    }
    tool = Tool(runtime, engine.modules(runtime, held_as), python, "--runtime-python")
    with TemporaryDirectory() as scratch:
        folder, module = Path(scratch), Path(run_passages.__file__)
        said = run_in(tool, module, job, folder, f"{runtime} cannot run {directory}")
        with np.load(folder / run_passages.LOG_PROBABILITIES) as file:
            found = [torch.from_numpy(file[name]) for name in file.files]
    return Ran(said["versions"], said["ids"], said["greedy"], said["tokens_s"], found)
