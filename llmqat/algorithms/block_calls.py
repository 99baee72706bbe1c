"""The arguments with which a model calls its blocks, one after the other: recorded without running a block.

A stand-in for each block returns the hidden states it was given, in the form in which the block would: alone, or as
the first item of a tuple. Which form it is shows at the next block, which must be given them again. Other items are
`Returned` placeholders: where one is among the arguments of a later block, the block's own output takes its place.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from llmqat.algorithms.stand_ins import replaced_forward
from llmqat.errors import LlmqatError

HIDDEN = "hidden_states"
# Items that a block returns: None for a tensor alone.
FORMS = (None, 1, 2, 3, 4)


class Stop(Exception):
    """Raised to end a forward whose remaining outputs nobody needs."""


class _WrongForm(Exception):
    """Raised where a block is not given what the one before it returned."""


class Returned(NamedTuple):
    """Stands for what a block returns beside its hidden states.

    Attributes:
        block: its index.
        item: of the tuple that it returns.
    """

    block: int
    item: int


class Arguments(NamedTuple):
    """How a model calls a block.

    Attributes:
        by_name: whether the hidden states are a keyword argument.
        args: positional arguments, after the hidden states.
        kwargs: keyword arguments, without them.
    """

    by_name: bool = False
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012

    def call(self, block: nn.Module, hidden: Tensor) -> Any:
        """Run `block` on hidden states and these arguments."""
        if self.by_name:
            return block(*self.args, **{HIDDEN: hidden}, **self.kwargs)
        return block(hidden, *self.args, **self.kwargs)

    def map(self, change: Any) -> "Arguments":
        """These arguments, each positional and keyword one changed."""
        kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return Arguments(self.by_name, tuple(map(change, self.args)), kwargs)

    def values(self) -> list[Any]:
        """Positional and keyword arguments, in order."""
        return [*self.args, *self.kwargs.values()]


class CallRecorder:
    """Records how a model calls its blocks, for one batch after the other.

    Args:
        model: that runs.
        blocks: its blocks, in order.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        self.model, self.blocks = model, blocks
        self.forms: dict[type, int | None] = {}  # of the kinds of blocks that were seen
        self.reached = -1  # index of the last block that returned

    def first(self, ids: Tensor) -> tuple[Tensor, Arguments]:
        """Run a batch of token ids up to the first block: what that reads, and how it is called."""
        hidden, calls = self._run(ids, 1)
        return hidden, calls[0]

    def all(self, ids: Tensor) -> tuple[Tensor, list[Arguments]]:
        """Run a batch of token ids past all blocks: what the first one reads, and how each is called.

        Raises:
            LlmqatError: if a block is given anything but the hidden states that the one before it returned.
        """
        while True:
            self.reached = -1
            try:
                return self._run(ids, len(self.blocks))
            except Exception as error:
                problem, index = error, self.reached
            if index < 0:
                raise problem
            kind = type(self.blocks[index])
            following = FORMS.index(self.forms[kind]) + 1
            if following == len(FORMS):
                raise LlmqatError(
                    f"what block {index} of {type(self.model).__name__} returns does not reach block {index + 1} as it "
                    f"is ({type(problem).__name__}: {problem}); GPTQ cannot walk through its blocks: use --init rtn"
                ) from problem
            self.forms[kind] = FORMS[following]

    def _run(self, ids: Tensor, count: int) -> tuple[Tensor, list[Arguments]]:
        """Run the model up to its block number `count`, with stand-ins for the blocks."""
        seen: list[Tensor] = []
        calls: list[Arguments] = []

        def stand_in(index: int, *args: Any, **kwargs: Any) -> Any:
            by_name = not args
            hidden = kwargs.pop(HIDDEN) if by_name else args[0]
            if seen and hidden is not seen[0]:
                raise _WrongForm(f"it reads {type(hidden).__name__} of another origin")
            seen[:] = [hidden]
            calls.append(Arguments(by_name, args[1:], kwargs))
            if len(calls) == count:
                raise Stop
            self.reached = index
            form = self.forms.setdefault(type(self.blocks[index]), None)
            return hidden if form is None else (hidden, *[Returned(index, item) for item in range(1, form)])

        with ExitStack() as stack:
            for index, block in enumerate(self.blocks):
                stack.enter_context(replaced_forward(block, partial(stand_in, index)))
            try:
                self.model(input_ids=ids, use_cache=False)
            except Stop:
                pass
        return seen[0], calls


def is_constant(call: Arguments, other: Arguments) -> bool:
    """Whether the arguments of two batches are the same, and stay so while blocks run: no block returned one, or can
    write into one."""
    values = call.values()
    state = any(isinstance(value, Returned) or (isinstance(value, dict | list) and not value) for value in values)
    return not state and _equal(values, other.values())


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and (a is b or (a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)))
    if isinstance(a, tuple | list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    return bool(a is b or a == b)


def sharing(call: Arguments, like: Arguments) -> Arguments:
    """The arguments of a batch, with tensors of another batch in place of those that are equal."""
    known = iter(like.values())
    return call.map(lambda value: _shared(value, next(known)))


def _shared(value: Any, like: Any) -> Any:
    if type(value) is tuple and type(like) is tuple and len(value) == len(like):
        return tuple(map(_shared, value, like))
    return like if isinstance(value, Tensor) and _equal(value, like) else value
