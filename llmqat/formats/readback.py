"""Read back what was written, by name, before it takes the place of what was there."""

from pathlib import Path

from llmqat.errors import LlmqatError
from llmqat.formats.reader import quantization_of
from llmqat.formats.skeleton import skeleton
from llmqat.formats.weights import tensor_headers


def read_back(directory: Path) -> None:
    """Every tensor in `directory` has its place in an empty model of the config there, and none is missing.

    Raises:
        LlmqatError: if the model could not be loaded again, with the reason.
    """
    try:
        skeleton(directory, quantization_of(directory), tensor_headers(directory), None)
    except LlmqatError as error:
        reason = str(error).replace(f"{directory}: ", "").replace(f"{directory} ", "").replace(f"{directory}/", "")
        raise LlmqatError(
            f"this model cannot be packed, since it could not be loaded again: the packed file {reason}. Give it back "
            "the modules of its config: merge adapters (merge_and_unload) and undo other changes before prepare"
        ) from error
