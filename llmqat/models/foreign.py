"""Config, tokenizer and weights that others wrote, read by transformers without running any of their code."""

from pathlib import Path
from typing import Any

from llmqat.errors import LlmqatError, error_text


class ForeignError(LlmqatError):
    """A file of a model that transformers cannot read; the message is what transformers said, in one line."""


def from_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """``kind.from_pretrained(name, **options)``, which never runs code of the directory and never asks whether it may.

    Raises:
        LlmqatError: if the model comes with code of its own.
        ForeignError: for whatever else transformers raises, with that exception as its cause.
    """
    try:
        return kind.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # json, validation and regex errors and many more: a file says what it must not
        if "trust_remote_code" in str(error):
            raise LlmqatError(
                f"model {name} comes with Python code of its own (auto_map), which llmqat never runs; use a model of a "
                "family that transformers knows"
            ) from error
        raise ForeignError(error_text(error)) from error


def local_directory(name: str | Path) -> Path:
    """A local model directory as it is, or a Hub repository downloaded.

    Raises:
        LlmqatError: if there is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(name)))
    except Exception as error:  # offline, missing and malformed names raise exceptions of several libraries
        raise LlmqatError(
            f"model {name} is neither a local directory nor a Hub repository that can be reached"
        ) from error
