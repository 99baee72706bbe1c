"""`--push-to-hub NAME`: a packed directory, or an export, with its model card, as a repository on the Hub."""

import re
from pathlib import Path
from typing import Any

from llmqat.errors import LlmqatError, error_text
from llmqat.formats import fingerprint
from llmqat.formats.directory import TEXT_FILES, WEIGHT_FILES, model_files
from llmqat.formats.export.compare import format_of
from llmqat.pipeline.export import CARD, card
from llmqat.pipeline.output import REPORT_FILES

# Not checkpoint/, which names folders of this machine; nor what somebody put into the directory.
PUBLISHED = (*WEIGHT_FILES, *TEXT_FILES, *REPORT_FILES, fingerprint.NAME, "adapter/*")
NAME = re.compile(r"[\w.-]+/[\w.-]+")


def check_name(name: str) -> None:
    """Refuse a name that is none of a repository, before any work is done.

    Raises:
        LlmqatError: if it is not of the form owner/model.
    """
    if not NAME.fullmatch(name):
        raise LlmqatError(f"--push-to-hub takes owner/model, got {name!r}")


def push_to_hub(directory: str | Path, name: str, api: Any = None) -> str:
    """Upload a packed directory, or the output of `export`, to the Hub, in one commit.

    A repository that is not there is made, and is private: whoever publishes it adds a license to its card first.

    Args:
        directory: to upload; one without a card gets one that says what it is.
        name: of the repository, owner/model.
        api: `huggingface_hub.HfApi`, by default one with the token of this machine.

    Returns:
        the address of the repository.

    Raises:
        LlmqatError: if the name is none, the directory holds no model, or the Hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    check_name(name)
    directory, api = Path(directory), api or HfApi()
    held_as = format_of(directory)
    files: dict[str, str | bytes] = {CARD: card(held_as).encode()}
    files |= {file: str(directory / file) for file in sorted(model_files(directory, PUBLISHED))}
    operations = [CommitOperationAdd(file, content) for file, content in files.items()]
    try:
        address = str(api.create_repo(name, private=True, exist_ok=True))
        api.create_commit(name, operations=operations, commit_message=f"Upload a model in {held_as} by llmqat")
    except Exception as error:  # offline, not logged in, not allowed: each has an exception of its own
        raise LlmqatError(
            f"cannot push {directory} to {name}: {error_text(error)}; log in by `hf auth login`, or check the name"
        ) from error
    return address
