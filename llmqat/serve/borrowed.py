"""`Borrowed`: the tensors of a model that its native decoder reads, and whether the model still holds them."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from llmqat.compat.torch import hooks_of, members_of
from llmqat.compat.transformers import captures_outputs
from llmqat.nn.kv_cache import is_kv_hook
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.parts import last_norm

_scheme = attrgetter("scheme")


@dataclass(frozen=True)
class Borrowed:
    """The blocks and the last norm of a decoder stack at one moment, as flat lists: comparing them walks no modules.

    A layer that is replaced, cast or moved is another object in one of `members`; a tensor whose ``data`` is set lies
    elsewhere; other activations are another scheme; a new hook is in a dict of `unhooked` or of `members`.

    Attributes:
        members: the dicts in which modules hold submodules, parameters, buffers and hooks, as far as they hold any.
        held: what is in them.
        unhooked: the dicts of hooks that hold none.
        places: where each tensor among `tensors` lies.
        schemes: how each of `linears` is quantized.
        listeners: whether hooks other than those of `quantize_kv` and of transformers listen inside.
    """

    members: list[dict[str, Any]]
    held: list[Any]
    unhooked: list[dict[int, Any]]
    tensors: list[Tensor]
    places: list[int]
    linears: list[PackedLinear]
    schemes: list[Any]
    listeners: bool

    @classmethod
    def of(cls, stack: Any) -> "Borrowed":
        """The tensors that the decoder of `stack` would borrow now."""
        inside = [*stack.layers.modules(), *last_norm(stack).modules()]
        hooks = [hooked for module in inside for hooked in hooks_of(module)]
        own = [member for module in (stack, *inside) for member in members_of(module)]
        members = [held for held in [*own, *hooks] if held]
        held = list(_values(members))
        tensors = [value for value in held if isinstance(value, Tensor)]
        linears = [module for module in inside if isinstance(module, PackedLinear)]
        return cls(
            members,
            held,
            [hooked for hooked in hooks if not hooked],
            tensors,
            [tensor.data_ptr() for tensor in tensors],
            linears,
            [linear.scheme for linear in linears],
            any(_listens(hook) for hooked in hooks for hook in hooked.values()),
        )

    def is_unchanged(self) -> bool:
        """Whether the model still holds all of it, in the same places."""
        held = list(_values(self.members))
        return (
            not any(self.unhooked)
            and len(held) == len(self.held)
            and all(map(is_, held, self.held))
            and list(map(Tensor.data_ptr, self.tensors)) == self.places
            and all(map(is_, map(_scheme, self.linears), self.schemes))
        )


def _values(members: list[dict[str, Any]]) -> Iterator[Any]:
    return chain.from_iterable(map(dict.values, members))


def _listens(hook: Any) -> bool:
    """Whether a hook may see or change what a block computes: the decoder does what that of `quantize_kv` does."""
    return not is_kv_hook(hook) and not captures_outputs(hook)
