"""`llmqat export`: a packed directory moved to the format of another engine, whole or not at all."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from llmqat.errors import LlmqatError
from llmqat.files import discard_partial, locked, make_directory, replacing
from llmqat.formats.directory import SEAL
from llmqat.formats.export.awq import write_awq
from llmqat.formats.export.check import check_held
from llmqat.formats.export.dense import write_dense
from llmqat.formats.export.gguf import write_gguf
from llmqat.formats.export.gptq import write_gptq
from llmqat.formats.export.holds import HOLDS
from llmqat.formats.export.mlx import write_mlx
from llmqat.formats.export.source import Source
from llmqat.pipeline.output import check_apart, holds_files

WRITERS: dict[str, Callable[[Source, Path], None]] = {
    "dense": write_dense,
    "gguf": write_gguf,
    "gptq": write_gptq,
    "awq": write_awq,
    "mlx": write_mlx,
}


@dataclass(frozen=True)
class Exported:
    """Outcome of `export`.

    Attributes:
        output: the directory that was written.
        format: its format.
        layers: how many layers on the grid were moved.
        bytes: of all files written.
        notes: what of the arithmetic of training the format does not hold, a line each.
    """

    output: Path
    format: str
    layers: int
    bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.output}: {self.format}, {self.layers} layers moved bit for bit, {self.bytes / 1e6:.1f} MB"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export(directory: str | Path, to: str, output: str | Path) -> Exported:
    """Move the codes and scales of a packed model to the format of another engine; nothing is quantized again.

    Args:
        directory: of the packed model; or its Hub id.
        to: the format: dense, gguf, gptq, awq or mlx.
        output: directory to write, which must be empty or not there.

    Returns:
        what was written. It appears whole or not at all.

    Raises:
        LlmqatError: if the format does not hold the model without loss, with the nearest grid that it holds; if the
            directory is damaged or not packed; or if `output` is not empty, or cannot be written.
    """
    if to not in HOLDS:
        raise LlmqatError(f"unknown format {to!r}; choose one of {', '.join(HOLDS)}")
    output = Path(output)
    with empty_output(output, str(directory)):
        source = Source.open(directory)
        check_held(source, to)
        with replacing(output, seal=SEAL) as scratch:
            WRITERS[to](source, scratch)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Exported(output, to, len(source.layers), size, tuple(source.notes()))


@contextmanager
def empty_output(directory: Path, model: str) -> Iterator[None]:
    """An output directory that is made, or was empty, kept from other processes; one that stays empty goes again.

    Raises:
        LlmqatError: if it holds anything, is that of `model`, cannot be written, or another process is writing there.
    """
    check_apart(directory, model)
    made = make_directory(directory)
    try:
        with locked(directory):
            if holds_files(directory):
                raise LlmqatError(f"output {directory} is not empty; choose another --output")
            discard_partial(directory, ("",))
            yield
    finally:
        for path in reversed(made):
            with suppress(OSError):  # something is in it
                path.rmdir()
