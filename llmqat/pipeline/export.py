"""`llmqat export`: a packed directory moved to the format of another engine, whole or not at all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
from llmqat.formats.export.onnx import write_onnx
from llmqat.formats.export.rounding import Rounding, measure_rounding
from llmqat.formats.export.source import Source
from llmqat.pipeline.output import check_apart, holds_files
from llmqat.report.text import LICENSE

CARD = "README.md"
CARRIED = "base_model", "datasets", "license", "model-index"
WRITERS: dict[str, Callable[[Source, Path], None]] = {
    "dense": write_dense,
    "gguf": write_gguf,
    "gptq": write_gptq,
    "awq": write_awq,
    "mlx": write_mlx,
    "onnx": write_onnx,
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
        rounding: what it rounded of the weights; None where they are those of training, bit for bit.
    """

    output: Path
    format: str
    layers: int
    bytes: int
    notes: tuple[str, ...]
    rounding: Rounding | None = None

    def __str__(self) -> str:
        how = "moved bit for bit" if self.rounding is None else "moved"
        first = f"{self.output}: {self.format}, {self.layers} layers {how}, {self.bytes / 1e6:.1f} MB"
        rounded = [] if self.rounding is None else [str(self.rounding)]
        return "\n".join([first, *rounded, *(f"note: {note}" for note in self.notes)])


def export(directory: str | Path, to: str, output: str | Path, allow_rounding: bool = False) -> Exported:
    """Move the codes and scales of a packed model to the format of another engine; nothing is quantized again.

    Args:
        directory: of the packed model; or its Hub id.
        to: the format: dense, gguf, gptq, awq, mlx or onnx.
        output: directory to write, which must be empty or not there.
        allow_rounding: go on where the format holds the grid, but rounds scales or minima; the loss is measured over
            all weights, and stands in the card.

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
        exact, notes = check_held(source, to, allow_rounding), tuple(source.notes())
        rounding = None if exact else measure_rounding(source, HOLDS[to])
        with replacing(output, seal=SEAL) as scratch:
            WRITERS[to](source, scratch)
            text = card(to, rounding, notes, metadata(source.directory / CARD))
            (scratch / CARD).write_text(text, encoding="utf-8")
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    return Exported(output, to, len(source.layers), size, notes, rounding)


def metadata(path: Path) -> dict[str, Any]:
    """Metadata of the model card of a packed directory that hold for its exports, too; empty where it has no card."""
    import yaml

    try:
        _, front, _ = path.read_text("utf-8").split("---\n", 2)
        found = yaml.safe_load(front)
        return {key: found[key] for key in CARRIED if key in found}
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # none, or one that somebody has written
        return {}


def card(
    to: str,
    rounding: Rounding | None = None,
    notes: Sequence[str] = (),
    carried: Mapping[str, Any] | None = None,
) -> str:
    """The model card of an export, with what is `carried` over from that of its packed directory; measurements among it
    are those of the packed model."""
    import yaml

    library = {"gguf": "gguf", "mlx": "mlx", "onnx": "onnxruntime-genai"}.get(to, "transformers")
    values = {"library_name": library, "tags": ["llmqat", to], **(carried or {})}
    head = yaml.safe_dump(values, sort_keys=False) + ("" if "license" in values else LICENSE)
    same = (
        "Codes and scales are those of the packed model that this was made of, bit for bit; nothing was quantized again"
    )
    changed = "The codes are those of the packed model that this was made of; nothing was quantized again"
    lines = [*([] if rounding is None else [str(rounding)]), *notes]
    return f"""---
{head}---
# Exported by llmqat to {to}

{same if rounding is None else changed}
(`llmqat verify` with `--against` compares the two).
{"".join(f"{chr(10)}- {line}" for line in lines)}
"""


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
