"""`llmqat.load_float` as before: ``model, stored = load_float(...)`` still works, with a warning, for one version."""

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

from llmqat.models import loading
from llmqat.models.loading import storage_dtype_of


def load_float(name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A float model in evaluation mode, which remembers the dtype its weights are stored in, for `prepare` and `pack`.

    Args:
        name: Hub id, directory, GGUF file or alias.
        dtype: to compute in; by default the stored one.

    Returns:
        the model. It can be unpacked into itself and the stored dtype, as in earlier versions; that ends with the next.

    Raises:
        LlmqatError: if it cannot be found or read, is quantized already, or its weights are damaged.
    """
    model = loading.load_float(name, dtype)
    model.__class__ = _unpackable(type(model))
    return model


def _unpackable(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """`kind` under its own name, whose models can be unpacked; their copies and pickles are plain ones."""

    def pair(self: PreTrainedModel) -> tuple[Any, ...]:
        warnings.warn(
            "load_float gives the model alone, which remembers its stored dtype: write "
            "`model = llmqat.load_float(...)`, and leave storage_dtype out of prepare",
            DeprecationWarning,
            stacklevel=3,
        )
        return self, storage_dtype_of(self)

    def as_plain(self: PreTrainedModel, _: Any) -> tuple[Any, ...]:
        return kind.__new__, (kind,), self.__dict__

    def unpacked(self: PreTrainedModel) -> Iterator[Any]:
        return iter(pair(self))

    def part(self: PreTrainedModel, index: int) -> Any:
        return pair(self)[index]

    members = {"__iter__": unpacked, "__getitem__": part, "__reduce_ex__": as_plain}
    names = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return type(kind.__name__, (kind,), {**members, **names})
