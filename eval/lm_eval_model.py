"""A packed llmqat model under lm-evaluation-harness: loglikelihoods, whole texts and generation by the packed op.

    python eval/lm_eval_model.py out --tasks arc_easy,hellaswag
    python eval/lm_eval_model.py out --tasks arc_easy,hellaswag --against ./my-model --output scores.json
    python eval/lm_eval_model.py out --tasks my_task --include-path my_tasks --limit 100
    python eval/lm_eval_model.py run --model llmqat --model_args pretrained=out,dtype=float32 --tasks arc_easy

With --against, the float model answers the same requests, and the difference carries its standard error, paired over
documents. The last form is the harness' own command line (`run`, `ls`, `validate`), which then knows the model
`llmqat`. Needs `pip install 'llmqat[lm-eval]'`; tasks of the harness are downloaded from the Hub, those of
--include-path may read local files.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lm_eval import simple_evaluate
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

import llmqat

DTYPES = ("auto", "bfloat16", "float16", "float32")
HARNESS_COMMANDS = ("run", "ls", "validate")


def dtype_named(name: str) -> torch.dtype | None:
    """A dtype of `DTYPES`; None for auto, the dtype of the file.

    Raises:
        LlmqatError: if it is none of them.
    """
    if name not in DTYPES:
        raise llmqat.LlmqatError(f"dtype must be one of {', '.join(DTYPES)}; got {name!r}")
    return None if name == "auto" else getattr(torch, name)


def usable(device: str | None) -> str:
    """The device, or the CPU where none was named or there is no CUDA."""
    return "cpu" if device is None or ("cuda" in device and not torch.cuda.is_available()) else device


@register_model("llmqat")
class PackedLM(HFLM):
    """The harness' model of transformers around `llmqat.load`: its requests run through ``llmqat::packed_linear``.

    Args:
        pretrained: packed directory, or Hub id of one.
        dtype: to compute in, see `DTYPES`.
        device: where to run; the CPU by default, and where CUDA is asked for, as the harness does, and not there.
        options: of `HFLM`, such as ``batch_size``, ``max_length`` or ``add_bos_token``.
    """

    def __init__(self, pretrained: str, dtype: str = "auto", device: str | None = None, **options: Any) -> None:
        model = llmqat.load(pretrained, dtype_named(dtype), usable(device))
        super().__init__(model, tokenizer=llmqat.load_tokenizer(pretrained), **options)


class FloatLM(HFLM):
    """The same around `llmqat.load_float`: what a packed model is compared with."""

    def __init__(self, pretrained: str, dtype: str = "auto", device: str | None = None, **options: Any) -> None:
        model = llmqat.load_float(pretrained, dtype_named(dtype))
        super().__init__(model.to(usable(device)), tokenizer=llmqat.load_tokenizer(pretrained), **options)


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str
    packed: float
    packed_stderr: float | None
    against: float | None = None
    against_stderr: float | None = None
    difference: float | None = None
    difference_stderr: float | None = None


def tasks_of(names: list[str], include_path: str | None) -> TaskManager:
    """A task manager that knows all `names`; the harness' own tasks are indexed only where they are needed.

    Raises:
        LlmqatError: if one is unknown.
    """
    for defaults in [False, True] if include_path else [True]:
        manager = TaskManager(include_path=include_path, include_defaults=defaults)
        unknown = [name for name in names if name not in manager.all_tasks]
        if not unknown:
            return manager
    raise llmqat.LlmqatError(
        f"no task {', '.join(unknown)}; `python eval/lm_eval_model.py ls tasks` lists them, and --include-path adds "
        "a folder of your own"
    )


def evaluate(lm: HFLM, manager: TaskManager, args: argparse.Namespace) -> dict[str, Any]:
    """Results of the harness, with its samples."""
    return simple_evaluate(
        model=lm,
        tasks=args.tasks,
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.apply_chat_template,
        bootstrap_iters=1000,
    )


def metrics_of(results: dict[str, Any]) -> Iterator[tuple[str, str, str, float, float | None]]:
    """Task, metric, filter, value and standard error (None where the harness gives none), of tasks and groups."""
    for task, values in results["results"].items():
        for key, value in values.items():
            metric, _, chosen = key.partition(",")
            if chosen and not metric.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{metric}_stderr,{chosen}")
                yield task, metric, chosen, float(value), float(error) if isinstance(error, int | float) else None


def per_document(results: dict[str, Any], task: str, metric: str, chosen: str) -> dict[int, float]:
    """What each document contributed to a metric that is a mean over documents; empty for other metrics and groups."""
    samples = [sample for sample in results["samples"].get(task, []) if sample["filter"] == chosen]
    found = {sample["doc_id"]: sample.get(metric) for sample in samples}
    return found if all(isinstance(value, int | float) for value in found.values()) else {}


def scores(packed: dict[str, Any], against: dict[str, Any] | None) -> list[Score]:
    """Every metric of the packed model; beside that of the float model where there is one."""
    rows = [Score(task, metric, value, error) for task, metric, _, value, error in metrics_of(packed)]
    if against is None:
        return rows
    compared = []
    for row, (task, metric, chosen, value, error) in zip(rows, metrics_of(against), strict=True):
        ours, theirs = (per_document(results, task, metric, chosen) for results in (packed, against))
        paired = torch.tensor([ours[document] - theirs[document] for document in ours], dtype=torch.float64)
        spread = float(paired.std() / len(paired) ** 0.5) if len(paired) > 1 else None
        compared.append(
            row._replace(against=value, against_stderr=error, difference=row.packed - value, difference_stderr=spread)
        )
    return compared


def table(rows: list[Score], against: str | None) -> str:
    """The scores as text; ``±`` is one standard error."""

    def shown(value: float | None, error: float | None, sign: str = "") -> str:
        if value is None:
            return ""
        return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")

    wide = max(len(row.task) for row in rows)
    titles = ["packed", "float", "packed - float"] if against else ["packed"]
    lines = [f"{'task':<{wide}}  {'metric':<16}" + "".join(f"{title:>22}" for title in titles)]
    for row in rows:
        cells = [shown(row.packed, row.packed_stderr)]
        if against:
            cells += [shown(row.against, row.against_stderr), shown(row.difference, row.difference_stderr, "+")]
        lines.append(f"{row.task:<{wide}}  {row.metric:<16}" + "".join(f"{cell:>22}" for cell in cells))
    return "\n".join(lines)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line of this script."""
    examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=examples[0], epilog=examples[2], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="packed directory")
    parser.add_argument("--tasks", required=True, type=lambda text: text.split(","), help="names, by commas")
    parser.add_argument("--against", metavar="MODEL", help="float model: directory, Hub id or llama")
    parser.add_argument("--include-path", metavar="FOLDER", help="folder of task files of your own")
    parser.add_argument("--num-fewshot", type=int, metavar="N", help="default: as the task says")
    parser.add_argument("--limit", type=float, metavar="N", help="documents of each task, or a share below 1")
    parser.add_argument("--batch-size", type=int, default=1, metavar="N")
    parser.add_argument("--max-length", type=int, metavar="N", help="tokens of a request; default: the model's context")
    parser.add_argument("--apply-chat-template", action="store_true", help="questions through the chat template")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="to compute in; auto: as stored")
    parser.add_argument("--device", help="default: cpu")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the scores as JSON")
    return parser.parse_args(argv)


def compare(args: argparse.Namespace) -> list[Score]:
    """Run the tasks on the packed model, then on the float one, and print both."""
    manager = tasks_of(args.tasks, args.include_path)
    options = {"batch_size": args.batch_size, "max_length": args.max_length}
    common = {"dtype": args.dtype, "device": args.device, **options}
    packed = evaluate(PackedLM(args.model, **common), manager, args)
    against = evaluate(FloatLM(args.against, **common), manager, args) if args.against else None
    rows = scores(packed, against)
    print(table(rows, args.against))
    if args.output:
        result = {
            "environment": {**llmqat.environment(), "lm_eval": version("lm_eval")},
            "arguments": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
            "documents": {task: counts["effective"] for task, counts in packed["n-samples"].items()},
            "task_versions": packed["versions"],
            "scores": [row._asdict() for row in rows],
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n")
    return rows


def main() -> None:
    """Compare by this script's command line, or hand over to that of the harness."""
    if sys.argv[1:2] and sys.argv[1] in HARNESS_COMMANDS:
        cli_evaluate()
        return
    args = arguments(sys.argv[1:])
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    try:
        compare(args)
    except llmqat.LlmqatError as error:
        raise SystemExit(f"lm_eval_model.py: {error}") from error


if __name__ == "__main__":
    main()
