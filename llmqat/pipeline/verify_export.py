"""`llmqat verify OUT --against DIR`: an exported model holds all codes and scales of its packed directory."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from llmqat.errors import LlmqatError
from llmqat.formats.export.check import check_held
from llmqat.formats.export.compare import differences, format_of, parts_of
from llmqat.formats.export.holds import PACKED
from llmqat.formats.export.source import Source
from llmqat.formats.importing.exported import decoder_of, layer_differences
from llmqat.pipeline.export import WRITERS


@dataclass(frozen=True)
class ExportCheck:
    """Outcome of `verify_export`.

    Attributes:
        format: of the exported model.
        layers: how many were decoded.
        tensors: how many others were compared.
        rounded: whether the format rounds scales or zero points of this grid; they are compared as rounded.
        differences: what is not that of the packed directory, a line for each kind.
    """

    format: str
    layers: int
    tensors: int
    rounded: bool
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the exported model is the packed one."""
        return not self.differences


def verify_export(directory: str | Path, against: str | Path) -> ExportCheck:
    """Compare an exported model with its packed directory, bit for bit: codes, scales, float parts, config, tokenizer.

    Layers on the grid are decoded from the exported file, by readers that share no code with the exporter. Everything
    else is compared with what another export to a temporary directory holds.

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
    source = Source.open(against)
    exact = check_held(source, to, allow_rounding=True)
    decoder = decoder_of(directory, to, source)
    wrong = layer_differences(decoder)
    found = parts_of(directory, decoder.tensors)
    with TemporaryDirectory() as scratch:
        WRITERS[to](source, Path(scratch))
        right = parts_of(Path(scratch), decoder.tensors)
    return ExportCheck(to, len(source.layers), len(right.tensors), not exact, (*wrong, *differences(found, right)))
