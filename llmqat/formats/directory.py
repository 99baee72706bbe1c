"""Which files of a directory belong to a model, and which of them llmqat wrote.

Whoever loads a model takes what lies there: a chat template, an adapter or a shard of another model changes it without
a word. What llmqat wrote it may replace; what it did not write it neither deletes nor mixes with its own.
"""

from collections.abc import Collection
from pathlib import Path

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint

SEAL = "config.json"
# What transformers, vLLM or peft read as weights, or as what the weights mean.
WEIGHT_FILES = (
    SEAL,
    "generation_config.json",
    "*.safetensors",
    "*.index.json",
    "pytorch_model*.bin",
    "model*.bin",
    "*.gguf",
    "adapter_config.json",
    "adapter_model.*",
    "quantize_config.json",
    "hf_quant_config.json",
    "custom_generate/*",
    "modeling_*.py",
    "configuration_*.py",
)
# What they read to turn text into tokens.
TEXT_FILES = (
    "tokenizer*",
    "chat_template*",
    "additional_chat_templates/*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*processor_config.json",
)


def model_files(directory: Path, patterns: Collection[str] = (*WEIGHT_FILES, *TEXT_FILES)) -> set[str]:
    """Names of the files in `directory` that belong to a model, relative to it."""
    found = {path for pattern in patterns for path in directory.glob(pattern)}
    return {path.relative_to(directory).as_posix() for path in found if not path.is_dir()}


def check_own(directory: Path) -> None:
    """A model that lies in `directory` must be one that llmqat wrote, and may replace.

    Raises:
        LlmqatError: naming its files, if it is another.
    """
    foreign = model_files(directory, WEIGHT_FILES)
    if foreign and not (directory / fingerprint.NAME).exists():
        raise _foreign(directory, foreign)


def stale_files(directory: Path, written: Collection[str]) -> list[str]:
    """Files of the model that llmqat wrote to `directory` earlier and that those now `written` do not replace: they go.

    Files for a tokenizer that somebody put beside it stay where no tokenizer is written.

    Raises:
        LlmqatError: if files that llmqat did not write would be read with those that are written.
    """
    check_own(directory)
    left, ours = model_files(directory) - set(written), _ours(directory)
    foreign = left if ours is None else left - ours
    if not any(_is_text(name) for name in written):
        foreign = {name for name in foreign if not _is_text(name)}
    if foreign:
        raise _foreign(directory, foreign)
    return sorted(left if ours is None else left & ours)


def _ours(directory: Path) -> set[str]:
    """The files of the model in `directory` that llmqat wrote."""
    if not (directory / fingerprint.NAME).exists():
        return set()
    sealed = (directory / SEAL).exists()
    try:
        files = fingerprint.read(directory).files
    except LlmqatError:  # damaged, or of an earlier version: llmqat's all the same
        return model_files(directory)
    return set(files) if sealed else model_files(directory)  # not sealed: a write that was cut short


def unlisted_files(directory: Path, listed: Collection[str]) -> list[str]:
    """Files in `directory` that would be read with a model but are none of those `listed`; a tokenizer may be added to
    a model that was written without one."""
    patterns = (*WEIGHT_FILES, *TEXT_FILES) if any(_is_text(name) for name in listed) else WEIGHT_FILES
    return sorted(model_files(directory, patterns) - set(listed))


def _is_text(name: str) -> bool:
    return any(Path(name).match(pattern) for pattern in TEXT_FILES)


def _foreign(directory: Path, names: Collection[str]) -> LlmqatError:
    named = ", ".join(sorted(names)[:3])
    return LlmqatError(
        f"{directory} holds {named}, which llmqat did not write and which would be read with the packed model; move "
        "them away, or choose another directory"
    )
