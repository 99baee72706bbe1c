"""`Source`: a packed directory as an exporter reads it, its layers on the grid and everything beside them."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Self

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.errors import LlmqatError
from llmqat.formats.reader import is_packed, load_packed
from llmqat.models.experts import file_name
from llmqat.models.foreign import local_directory
from llmqat.models.ties import shared_ties
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.kv_cache import kv_bits_of
from llmqat.nn.packed_linear import PackedLinear


class Source(NamedTuple):
    """A packed model to be exported.

    Attributes:
        directory: where it lies.
        model: loaded, its layers on the grid `PackedLinear`.
        layers: these by name, in the order of the model.
    """

    directory: Path
    model: PreTrainedModel
    layers: dict[str, PackedLinear]

    @classmethod
    def open(cls, name: str | Path) -> Self:
        """Read the packed directory, or Hub repository, `name`.

        Raises:
            LlmqatError: if it is damaged, or not packed.
        """
        directory = local_directory(name)
        if not is_packed(directory):
            raise LlmqatError(
                f"{name} holds no packed model, and only one has codes to export; give the output of llmqat finetune "
                "or llmqat quantize"
            )
        model = load_packed(directory, native=False)
        layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, PackedLinear)}
        return cls(directory, model, layers)

    def tied_embedding(self) -> str | None:
        """Name of the input embedding whose rows are the codes of the output head; None where it is float."""
        embedding = self.model.get_input_embeddings()
        names = {id(module): name for name, module in self.model.named_modules()}
        return names[id(embedding)] if isinstance(embedding, PackedEmbedding) else None

    def file_name(self, layer: str) -> str:
        """The name of a layer in files; a head that shares its codes with the embedding goes by the name of that."""
        head = self.model.get_output_embeddings()
        tied = self.tied_embedding()
        return tied if tied and self.model.get_submodule(layer) is head else file_name(self.model, layer)

    def float_parts(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors outside the layers on the grid by their names in files; a tied one once."""
        ties = shared_ties(self.model)
        for name, tensor in self.model.state_dict().items():
            if name not in ties and name.rpartition(".")[0] not in self.layers:
                yield file_name(self.model, name), tensor

    def float_linears(self) -> list[str]:
        """Names in files of linear layers that are on no grid."""
        modules = self.model.named_modules()
        return [file_name(self.model, name) for name, module in modules if isinstance(module, nn.Linear)]

    def notes(self) -> list[str]:
        """Parts of the arithmetic of training that no other format holds, a line each."""
        found = []
        if any(layer.scheme.inputs != "float" for layer in self.layers.values()):
            found.append(
                "trained with int8 activations, of which the exported model says nothing: engines run it with those "
                "they choose"
            )
        if kv_bits_of(self.model):
            found.append("trained with an int8 cache, of which the exported model says nothing")
        return found
