"""Read a float model part by part from its safetensors, for models larger than memory."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llmqat.compat.transformers import load_tensors, names_in_model
from llmqat.errors import LlmqatError
from llmqat.formats.reader import generation_config, local_directory
from llmqat.formats.weights import weight_files
from llmqat.models.loading import load_config, load_empty, resolve_name


class PartialModel:
    """A float model on the meta device, whose parts are read on request.

    Names and layouts are brought in line by transformers' own loading, with which whole models are loaded too.

    Attributes:
        model: the model, in evaluation mode; what was not read is on the meta device.
        dtype: in which its weights are stored.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        """Open the model `name`: a Hub id, a directory or an alias; what is read goes to `device`.

        Raises:
            LlmqatError: see `load_config`; or if its weights are damaged, or are not safetensors.
        """
        self.name, self.device = name, device
        load_config(name)  # says what is wrong with a name better than a download
        directory = local_directory(resolve_name(name))
        self.model, self.dtype = load_empty(name)
        self.model.eval()
        for buffer in self.model.buffers():  # in no file, and so not on the meta device
            buffer.data = buffer.data.to(device)
        if not any(directory.glob("*.safetensors")):
            raise LlmqatError(
                f"model {name} has no safetensors, which can be read in parts; load it once with transformers and "
                "write it again with save_pretrained"
            )
        if (directory / "generation_config.json").exists():
            self.model.generation_config = generation_config(directory)
        self.file_of: dict[str, Path] = {}
        for path in weight_files(directory):
            with ExitStack() as stack:
                keys = _opened(path, stack).keys()
                self.file_of |= dict.fromkeys(keys, path)
        self.name_of = names_in_model(self.model, self.file_of)

    def read(self, prefix: str, outside: bool = False) -> None:
        """Read every tensor whose name in the model starts with `prefix`, or with `outside` every other, in float32.

        Raises:
            LlmqatError: if one is damaged or missing.
        """
        keys = [key for key, name in self.name_of.items() if name.startswith(prefix) != outside]
        with ExitStack() as stack:
            files = {path: _opened(path, stack) for path in {self.file_of[key] for key in keys}}
            state = {key: files[self.file_of[key]].get_slice(key) for key in keys}
            load_tensors(self.model, state, torch.float32)
        self.model.tie_weights()
        wanted = {name: p for name, p in self.model.named_parameters() if name.startswith(prefix) != outside}
        lost = [name for name, parameter in wanted.items() if parameter.is_meta]
        if lost:
            what = ", ".join(lost[:3])
            raise LlmqatError(f"cannot load the weights of {self.name}: they lack {what}; copy or download it again")
        for parameter in wanted.values():
            parameter.data = parameter.data.to(self.device, copy=True)  # a float32 file would stay mapped otherwise


def _opened(path: Path, stack: ExitStack) -> Any:
    try:
        return stack.enter_context(safe_open(path, framework="pt"))
    except SafetensorError as error:
        raise LlmqatError(f"{path} is damaged ({error}); copy or download the model again") from error
