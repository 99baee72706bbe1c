"""The private function of a modeling file of transformers that rotates queries and keys, and its stand-in."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torch import nn

from llmqat.compat.register import leans_on

NAME = "apply_rotary_pos_emb"
Rotary = Callable[..., Any]


@leans_on("transformers.models.llama.modeling_llama.apply_rotary_pos_emb", test="tests/nn/test_native_modules.py")
@contextmanager
def rotary_by(stand_in: Callable[[Rotary], Rotary | None], models: Iterable[nn.Module]) -> Iterator[None]:
    """Let the modeling files of models rotate by other functions inside the ``with``.

    Attention finds the function by its name in its own file, so the name is what changes, for all models of the family
    in this process. It is put back whatever happens, unless somebody else has changed it meanwhile.

    Args:
        stand_in: gives the function that computes what one of transformers does, or None to leave that one.
        models: whose families are meant.
    """
    changed: list[tuple[ModuleType, Rotary, Rotary]] = []
    try:
        for file in _modeling_files(models):
            original = vars(file)[NAME]
            other = None if hasattr(original, "stands_for") else stand_in(original)
            if other is not None:
                other.stands_for = original  # type: ignore[attr-defined]
                vars(file)[NAME] = other
                changed.append((file, original, other))
        yield
    finally:
        for file, original, other in changed:
            if vars(file).get(NAME) is other:
                vars(file)[NAME] = original


def _modeling_files(models: Iterable[nn.Module]) -> list[ModuleType]:
    """Files of transformers' models that define classes of these modules and hold the function."""
    names = {type(module).__module__ for model in models for module in model.modules()}
    known = sorted(name for name in names if name.startswith("transformers.models."))
    return [sys.modules[name] for name in known if NAME in vars(sys.modules[name])]
