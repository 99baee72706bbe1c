"""Run tasks of lm-evaluation-harness on a model, for `llmqat eval --tasks`, and register the model `llmqat` there.

The command line of the harness knows the model once this module is imported, as it is by::

    python -m llmqat.metrics.harness run --model llmqat --model_args pretrained=out --tasks arc_easy

`pyproject.toml` names it as an entry point of ``lm_eval.models``, where later releases of the harness than 0.4.13 look
for models of other packages: to them ``lm_eval --model llmqat`` is enough.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.machine import environment
from llmqat.models.loading import load_tokenizer

try:
    from lm_eval import simple_evaluate
    from lm_eval.__main__ import cli_evaluate as cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as error:
    raise LlmqatError(
        f"tasks are run by lm-evaluation-harness, which is not there ({error}): pip install 'llmqat[lm-eval]'"
    ) from error

DTYPES = ("auto", "bfloat16", "float16", "float32")
RESAMPLES = 1000  # for standard errors of metrics that are no means


@register_model("llmqat")
class PackedLM(HFLM):
    """The harness' model of transformers around a packed directory: its requests run through ``llmqat::packed_linear``.

    Args:
        pretrained: packed directory, or Hub id of one.
        dtype: to compute in, see `DTYPES`; auto is that of the file.
        device: where to run; the CPU by default, and where CUDA is asked for, as the harness does, and not there.
        options: of `HFLM`, such as ``batch_size``, ``max_length`` or ``add_bos_token``.
    """

    def __init__(self, pretrained: str, dtype: str = "auto", device: str | None = None, **options: Any) -> None:
        if dtype not in DTYPES:
            raise LlmqatError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
        here = "cpu" if device is None or ("cuda" in device and not torch.cuda.is_available()) else device
        model = load_packed(pretrained, None if dtype == "auto" else getattr(torch, dtype), here)
        super().__init__(model, tokenizer=load_tokenizer(pretrained), **options)


@dataclass(frozen=True)
class Tasks:
    """Tasks, and how they are asked.

    Attributes:
        names: of tasks and of groups of them.
        folder: of task files of your own, beside those of the harness.
        few_shot: examples before each question; None for as many as the task says.
        limit: documents of each task at most; None for all.
        batch_size: requests at a time.
        chat: whether questions go through the chat template.
    """

    names: tuple[str, ...]
    folder: str | None = None
    few_shot: int | None = None
    limit: int | None = None
    batch_size: int = 1
    chat: bool = False

    def manager(self) -> TaskManager:
        """A task manager that knows all names; the harness' own tasks are indexed only where they are needed.

        Raises:
            LlmqatError: if one is unknown, or the folder is none.
        """
        if self.folder is not None and not Path(self.folder).is_dir():
            raise LlmqatError(f"{self.folder} is no folder of task files; give another --task-path")
        for defaults in [False, True] if self.folder else [True]:
            manager = TaskManager(include_path=self.folder, include_defaults=defaults)
            unknown = [name for name in self.names if name not in manager.all_tasks]
            if not unknown:
                return manager
        raise LlmqatError(
            f"lm-evaluation-harness {version('lm_eval')} has no task {', '.join(unknown)}; `lm_eval ls tasks` lists "
            "them, and --task-path adds a folder of your own"
        )

    def run(self, model: Any, tokenizer: Any, manager: TaskManager) -> dict[str, Any]:
        """Results of the harness on a loaded model, with its samples."""
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        found: dict[str, Any] = simple_evaluate(
            model=HFLM(model, tokenizer=tokenizer, batch_size=self.batch_size),
            tasks=list(self.names),
            task_manager=manager,
            num_fewshot=self.few_shot,
            limit=self.limit,
            apply_chat_template=self.chat,
            bootstrap_iters=RESAMPLES,
        )
        return found


class Score(NamedTuple):
    """One metric of one task, of a model and of what it is compared with; errors are standard errors."""

    task: str
    metric: str
    value: float
    stderr: float | None
    against: float | None = None
    against_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


def metrics_of(results: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float | None]]:
    """Task, metric, filter, value and standard error (None where the harness gives none), of tasks and groups."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if chosen and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{chosen}")
                yield task, metric, chosen, float(value), float(error) if isinstance(error, int | float) else None


def per_document(results: dict[str, Any], task: str, metric: str, chosen: str) -> dict[int, float]:
    """Contribution of each document to a metric that is a mean over documents; empty for other metrics and groups."""
    samples = [sample for sample in results["samples"].get(task, []) if sample["filter"] == chosen]
    found = {sample["doc_id"]: sample.get(metric) for sample in samples}
    return found if all(isinstance(value, int | float) for value in found.values()) else {}


def scores(results: dict[str, Any], against: dict[str, Any] | None = None) -> list[Score]:
    """Every metric of a model; beside that of another where there is one, their difference paired over documents."""
    rows = [Score(task, metric, value, error) for task, metric, _, value, error in metrics_of(results)]
    if against is None:
        return rows
    compared = []
    for row, (task, metric, chosen, value, error) in zip(rows, metrics_of(against), strict=True):
        ours, theirs = (per_document(each, task, metric, chosen) for each in (results, against))
        paired = torch.tensor([ours[document] - theirs[document] for document in ours], dtype=torch.float64)
        spread = float(paired.std() / len(paired) ** 0.5) if len(paired) > 1 else None
        compared.append(
            row._replace(against=value, against_stderr=error, difference=row.value - value, difference_stderr=spread)
        )
    return compared


def table(rows: Sequence[Score]) -> str:
    """The scores as text; ``±`` is one standard error."""
    compared = any(row.against is not None for row in rows)

    def shown(value: float | None, error: float | None, sign: str = "") -> str:
        if value is None:
            return ""
        return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")

    wide = max(len(row.task) for row in rows)
    titles = ["score", "against", "difference"] if compared else ["score"]
    lines = [f"{'task':<{wide}}  {'metric':<16}" + "".join(f"{title:>22}" for title in titles)]
    for row in rows:
        cells = [shown(row.value, row.stderr)]
        if compared:
            cells += [shown(row.against, row.against_stderr), shown(row.difference, row.difference_stderr, "+")]
        lines.append(f"{row.task:<{wide}}  {row.metric:<16}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def as_json(rows: list[Score], results: dict[str, Any]) -> dict[str, Any]:
    """The scores with what they were measured by: versions, documents, machine."""
    return {
        "scores": [row._asdict() for row in rows],
        "documents": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "task_versions": results["versions"],
        "environment": {**environment(), "lm_eval": version("lm_eval")},
    }
