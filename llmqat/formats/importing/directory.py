"""Write the packed directory of a checkpoint: layers on their grids, everything else as it was."""

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.formats import fingerprint
from llmqat.formats.compressed_tensors import config_of
from llmqat.formats.export.directory import copy_text_files, write_shards
from llmqat.formats.importing.grids import FoundLayer
from llmqat.formats.readback import read_back
from llmqat.models.experts import file_name, module_name, routers
from llmqat.progress import track
from llmqat.scheme import QuantScheme

GENERATION = "generation_config.json"


class Checkpoint(NamedTuple):
    """A checkpoint to be imported.

    Attributes:
        directory: with its tokenizer and generation config.
        model: of its config, on the meta device.
        layers: what makes those on a grid, by their names in the files.
        floats: every other tensor by its name in the files.
    """

    directory: Path
    model: PreTrainedModel
    layers: dict[str, Callable[[], FoundLayer]]
    floats: Iterable[tuple[str, Tensor]]

    def float_layers(self) -> list[str]:
        """Names in files of linear layers that are on no grid."""
        modules = self.model.named_modules()
        linear = [file_name(self.model, name) for name, module in modules if isinstance(module, nn.Linear)]
        return [name for name in linear if name not in self.layers]


def write_checkpoint(found: Checkpoint, scratch: Path) -> None:
    """Write a checkpoint to `scratch` as a packed directory, with a fingerprint of what was found.

    Raises:
        LlmqatError: if the model could not be loaded again.
    """
    written = Written({}, {}, {})
    write_shards(_tensors(found, written), scratch)
    packed_config(found, written.schemes).save_pretrained(scratch)
    if (found.directory / GENERATION).exists():
        shutil.copyfile(found.directory / GENERATION, scratch / GENERATION)
    copy_text_files(found.directory, scratch)
    fingerprint.write(scratch, written.layers, written.tensors)
    read_back(scratch)


class Written(NamedTuple):
    """Facts about tensors once they are written: grids and hashes of layers, hashes of all."""

    schemes: dict[str, QuantScheme]
    layers: fingerprint.Layers
    tensors: dict[str, str]


def _tensors(found: Checkpoint, written: Written) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the packed file by its name, noted in `written`."""
    dtype: Any = found.model.config.dtype or torch.float32
    for name, tensor in found.floats:
        written.tensors.update(fingerprint.tensor_hashes({name: tensor}))
        yield name, tensor
    for name, make in track(found.layers.items(), "import", len(found.layers)):
        layer = make().stored_in(dtype)
        written.schemes[name] = layer.scheme
        written.layers[module_name(found.model, name)] = layer.hashes()
        for part, tensor in layer.tensors().items():
            written.tensors.update(fingerprint.tensor_hashes({f"{name}.{part}": tensor}))
            yield f"{name}.{part}", tensor


def packed_config(found: Checkpoint, schemes: dict[str, QuantScheme]) -> Any:
    """The config of a checkpoint with the grids of its layers."""
    config = found.model.config
    config.architectures = [type(found.model).__name__]
    ignored = [*found.float_layers(), *(file_name(found.model, name) for name in routers(found.model))]
    config.quantization_config = config_of(schemes, ignored)
    return config
