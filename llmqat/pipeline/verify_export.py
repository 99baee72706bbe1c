"""`llmqat verify OUT --against DIR`: an exported model holds all codes and scales of its packed directory."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmqat.errors import LlmqatError
from llmqat.formats.export.compare import differences, format_of, parts_of
from llmqat.formats.export.holds import PACKED
from llmqat.pipeline.export import export


@dataclass(frozen=True)
class ExportCheck:
    """Outcome of `verify_export`.

    Attributes:
        format: of the exported model.
        tensors: how many were compared.
        differences: what is not that of the packed directory, a line for each kind.
    """

    format: str
    tensors: int
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the exported model is the packed one."""
        return not self.differences


def verify_export(directory: str | Path, against: str | Path) -> ExportCheck:
    """Compare an exported model with its packed directory, bit for bit: codes, scales, float parts, config, tokenizer.

    The packed directory is exported once more, to where temporary files go, and all parts of the two are compared.

    Args:
        directory: the output of `export`.
        against: the packed directory it was made of, or its Hub id.

    Raises:
        LlmqatError: if the exported model is damaged, or is of no known format; see `export` for the packed directory.
    """
    directory = Path(directory)
    to = format_of(directory)
    if to == PACKED:
        raise LlmqatError(f"{directory} is a packed directory, and no export of one; leave --against out")
    found = parts_of(directory)
    with TemporaryDirectory() as scratch:
        export(against, to, Path(scratch) / "again", allow_rounding=True)
        right = parts_of(Path(scratch) / "again")
    return ExportCheck(to, len(right.tensors), tuple(differences(found, right)))
