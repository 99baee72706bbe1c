"""Run one model in one engine: started by `run_engine`, with a folder that holds a job, in which it leaves the result.

This runs in the Python of the engine's environment, which may have neither llmqat nor torch.
"""

import importlib.util
import json
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any, Protocol

import numpy as np

JOB, RESULT, LOG_PROBABILITIES = "job.json", "result.json", "log_probabilities.npz"


class Model(Protocol):
    """One model in one engine."""

    def tokens(self, text: str) -> list[int]:
        """Ids of a text, with the special tokens that the engine adds."""

    def greedy(self, ids: list[int], new: int) -> list[int]:
        """`new` tokens that continue `ids`, each the likeliest one, by the engine's own loop with its cache."""

    def log_probabilities(self, ids: list[int]) -> np.ndarray:
        """Log-probabilities of next tokens ``(len(ids) - 1, vocabulary)``, behind all of `ids` but the last."""


def engine_file(name: str) -> Any:
    """The module of an engine: of this folder, loaded by its path as a package of its own."""
    folder = Path(__file__).parent
    spec = importlib.util.spec_from_file_location("engines", folder / "__init__.py")
    assert spec is not None
    sys.modules["engines"] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"engines.{name}")


def run(job: dict[str, Any]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Ids, greedy continuations and log-probabilities of the passages of a job, and versions."""
    missing = [module for module in job["modules"] if importlib.util.find_spec(module) is None]
    if missing:
        return {"missing": missing}, []
    model: Model = engine_file(job["file"]).load(job["directory"], job)
    said = {
        "ids": [model.tokens(text) for text in job["texts"]],
        "greedy": [model.greedy(ids[: job["prompt"]], job["new"]) for ids in job["ids"]],
    }
    found = [model.log_probabilities(ids) for ids in job["ids"]]
    return said | {"versions": dict(map(installed, job["modules"]))}, found


def installed(module: str) -> tuple[str, str]:
    """Name and version of the package that a module belongs to; of the module, where it was not installed."""
    for name in packages_distributions().get(module, ()):
        return name.replace("_", "-"), version(name)
    return module, importlib.import_module(module).__version__


def main() -> None:
    """Run the job in the folder that the command line names."""
    folder = Path(sys.argv[1])
    result, found = run(json.loads((folder / JOB).read_text("utf-8")))
    np.savez(folder / LOG_PROBABILITIES, *found)
    (folder / RESULT).write_text(json.dumps(result), "utf-8")


if __name__ == "__main__":
    main()
