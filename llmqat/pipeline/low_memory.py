"""Run a model larger than memory, by `--low-memory`: its weights stay in their files, and one block at a time is read.

What a run adds for each weight lies on the disk as well: what GPTQ changed, the codes before training, those that are
packed. The stages are those of every run, and so are the packed bytes.
"""

from pathlib import Path

import torch

from llmqat.algorithms.gptq_model import GptqSettings
from llmqat.formats.mapped_model import load_mapped
from llmqat.mapped import Disk
from llmqat.models.streaming import BlockStream

# Of a block's activations kept between passes over the calibration data; beyond, they are computed again.
KEPT_BYTES = 1 << 30


class LowMemory:
    """The float model of a run with one block in memory at a time, whatever runs it, and a disk for what is added.

    Args:
        name: of the model.
        directory: of the run.
        device: that computes.

    Raises:
        LlmqatError: see `load_mapped` and `check_blocks`.
    """

    def __init__(self, name: str, directory: Path, device: torch.device) -> None:
        self.disk = Disk(directory)
        self.model = load_mapped(name, self.disk)
        self.stream = BlockStream(self.model, device)
        self.stream.place(self.model)

    def settings(self, settings: GptqSettings) -> GptqSettings:
        """How GPTQ treats every layer."""
        return settings._replace(kept_bytes=KEPT_BYTES, disk=self.disk)
