"""The output directory of a run: whose it is, what may be replaced in it, and what of an earlier run goes."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peft import PeftModel

from llmqat.config import BASELINES, Recipe, to_yaml
from llmqat.errors import LlmqatError
from llmqat.files import PARTIAL, discard_partial, locked, make_directory, replacing
from llmqat.models.loading import resolve_name
from llmqat.pipeline.saved import read_record
from llmqat.processes import is_first
from llmqat.report import details
from llmqat.report.details import NAME as DETAILS
from llmqat.report.measured import Measured, write_json
from llmqat.report.names import public_recipe
from llmqat.report.page.render import PAGE, REPORT, write_page
from llmqat.report.text import model_card
from llmqat.train import checkpoint
from llmqat.train.adapter_files import BESIDE
from llmqat.train.checkpoint import REMEDY

RECIPE, CHECKPOINT, ADAPTER = "recipe.yaml", "checkpoint", "adapter"
GPTQ, CONTROL, OTHER_TOOLS = "gptq", "control", "baselines"  # below the checkpoint
# What a report of a run consists of: stale as soon as another model is in the directory.
REPORT_FILES = (RECIPE, REPORT, PAGE, DETAILS, "README.md")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", BESIDE, "README.md")
# Where a run writes, and so where a killed one may leave unfinished files.
FOLDERS = ("", CHECKPOINT, f"{CHECKPOINT}/{GPTQ}", f"{CHECKPOINT}/{CONTROL}", ADAPTER)


def check_output(directory: Path, resume: bool, overwrite: bool) -> None:
    """Refuse to damage a finished run or foreign files; touches nothing.

    Raises:
        LlmqatError: if it holds a run or anything else and neither flag allows to go on, or cannot be read.
    """
    try:
        if directory.exists() and not directory.is_dir():
            raise LlmqatError(f"output {directory} is a file; choose a directory")
    except OSError as error:
        raise LlmqatError(f"cannot write to {directory}: {error.strerror}; choose another --output") from error
    try:
        begun = directory.is_dir() and holds_files(directory)
    except OSError as error:
        raise LlmqatError(f"cannot read {directory}: {error.strerror}; choose another --output") from error
    if overwrite or not begun:
        return
    if not resume:
        raise LlmqatError(
            f"output {directory} is not empty; choose another --output, go on with --resume, or add --overwrite"
        )
    if read_record(directory / CHECKPOINT) is None:
        raise LlmqatError(
            f"--resume: {directory} holds other files, and nothing in {CHECKPOINT}/ to go on from; choose another "
            f"--output, or {REMEDY}"
        )


def holds_files(directory: Path) -> bool:
    """Whether a directory holds more than what a process left that was killed before it had finished a file."""
    names = [path.name for path in directory.iterdir() if not path.name.startswith(PARTIAL)]
    below = directory / CHECKPOINT
    return names != [] and not (names == [CHECKPOINT] and below.is_dir() and not holds_files(below))


def saved_recipe(directory: Path) -> Recipe | None:
    """The recipe of the run that was begun in an output directory, wherever that lies now; None where none was.

    Raises:
        LlmqatError: if it is damaged, or of another version.
    """
    record = read_record(directory / CHECKPOINT)
    if record is None:
        return None
    return Recipe().with_values({**record["recipe"], "output": str(directory)})


def check_apart(directory: Path, model: str) -> None:
    """Refuse an output directory that is the model's, lies in it or holds it.

    Raises:
        LlmqatError: if it does.
    """
    source = Path(resolve_name(model))
    if not source.is_dir():
        return
    output, source = directory.resolve(), source.resolve()
    for relation, wrong in (
        ("is", output == source),
        ("lies inside", source in output.parents),
        ("holds", output in source.parents),
    ):
        if wrong:
            raise LlmqatError(
                f"output {directory} {relation} the directory of the model {model}; choose another --output"
            )


@contextmanager
def claimed(directory: Path, model: str, resume: bool, overwrite: bool) -> Iterator[None]:
    """The output directory, made, seen to be writable, and kept from other processes; of several, the first claims it.

    What processes that were killed left unfinished is removed. A directory that was made here and stayed empty goes.

    Raises:
        LlmqatError: see `check_output` and `check_apart`; or if another process is writing there.
    """
    check_apart(directory, model)
    if not is_first():
        yield
        return
    check_output(directory, resume, overwrite)
    made = make_directory(directory)
    try:
        with locked(directory):
            check_output(directory, resume, overwrite)
            discard_partial(directory, FOLDERS)
            with replacing(directory):
                pass
            yield
    finally:
        for path in reversed(made):
            with suppress(OSError):  # something is in it
                path.rmdir()


def save_adapter(model: PeftModel, directory: Path, base: str) -> None:
    """Write the adapters of a model, which was made of the model named `base`, and what trained beside them."""
    for config in model.peft_config.values():
        config.base_model_name_or_path = base
    with replacing(directory) as scratch:
        model.save_pretrained(str(scratch), save_embedding_layers=False)
        (scratch / "README.md").unlink(missing_ok=True)  # peft's empty card, which names the folder of the model


def forget_earlier(directory: Path) -> None:
    """Remove the state and the adapter of an earlier run; its model goes when another is packed."""
    forget_preparation(directory / CHECKPOINT)
    checkpoint.discard(directory / CHECKPOINT)
    checkpoint.discard(directory / ADAPTER, ADAPTER_FILES)


def forget_preparation(saved: Path) -> None:
    """Remove from a checkpoint what leads to the training state, and is larger: GPTQ's blocks, the control, and what
    other tools left."""
    for name in BASELINES:
        shutil.rmtree(saved / OTHER_TOOLS / name, ignore_errors=True)
    for finished in (GPTQ, CONTROL, OTHER_TOOLS):
        checkpoint.discard(saved / finished)


def write_reports(measured: Measured, found: dict[str, Any], directory: Path) -> Path:
    """Write the report of a finished run in all its forms, with the model card and the recipe to publish.

    Args:
        measured: its numbers.
        found: its details.
        directory: its output.

    Returns:
        the page, to be looked at in a browser.
    """
    with replacing(directory) as scratch:
        write_json(measured, scratch / REPORT)
        details.write(found, scratch / DETAILS)
        (scratch / "README.md").write_text(model_card(measured))
        (scratch / RECIPE).write_text(to_yaml(public_recipe(measured.recipe)))
    return write_page(directory)
