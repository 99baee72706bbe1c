"""`llmqat import`: a quantized checkpoint of another tool as a packed directory, whole or not at all."""

from dataclasses import dataclass
from pathlib import Path

from llmqat.files import replacing
from llmqat.formats import fingerprint
from llmqat.formats.directory import SEAL
from llmqat.formats.importing.checkpoint import checkpoint_of
from llmqat.formats.importing.directory import write_checkpoint
from llmqat.pipeline.export import empty_output


@dataclass(frozen=True)
class Imported:
    """Outcome of `import_checkpoint`.

    Attributes:
        output: the packed directory.
        layers: how many are on their grids, with equal codes and scales.
        others: linear layers of the blocks that are float there.
    """

    output: Path
    layers: int
    others: int

    def __str__(self) -> str:
        return f"{self.output}: {self.layers} layers moved bit for bit, {self.others} linear layers float"


def import_checkpoint(source: str | Path, output: str | Path) -> Imported:
    """Make a packed directory of a quantized checkpoint of another tool; nothing is quantized again.

    Args:
        source: directory or Hub id of a GPTQ or AWQ checkpoint, or a GGUF file with blocks of Q4_0, Q5_0 or Q8_0.
        output: directory to write, which must be empty or not there.

    Returns:
        what was written. It appears whole or not at all, loads by `llmqat.load`, and exports.

    Raises:
        LlmqatError: if the checkpoint is damaged, of another format, or on a grid that llmqat does not have; or if
            `output` is not empty, or cannot be written.
    """
    output = Path(output)
    with empty_output(output, str(source)):
        found = checkpoint_of(source)
        with replacing(output, seal=SEAL, first=fingerprint.NAME) as scratch:
            write_checkpoint(found, scratch)
    return Imported(output, len(found.layers), len(found.float_layers()))
