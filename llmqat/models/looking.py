"""Find the blocks of a model by looking at it: the modules of a list that run on its hidden states.

Blocks lie in a `ModuleList` that is inside no other. Where there are several (towers for images or sound beside the
decoder), and before anything relies on their order, one pass of tokens without values tells which of them run, how
often, and whether each reads what the one before it returned. It computes nothing, so it costs the same for any size.
"""

import copy
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.compat.torch import fake_tensors
from llmqat.errors import LlmqatError

PROBE_TOKENS = 4


class NotInARow(LlmqatError):
    """Blocks that do not run one after the other, each on what the one before it returned.

    Attributes:
        problem: what they do, in a clause.
    """

    def __init__(self, problem: str) -> None:
        self.problem = problem
        super().__init__(
            f"{problem}, and only --init gptq and rtn, without --smooth and --low-memory, need no blocks that run one "
            "after the other; use those"
        )


class Call(NamedTuple):
    """One run of a module of a list, in a probe pass.

    Attributes:
        path: of the list.
        place: of the module in it.
        hidden: what it read.
        returned: its hidden states, if that is what it returned.
    """

    path: str
    place: int
    hidden: Any
    returned: Any


def hidden_of(returned: Any) -> Any:
    """The hidden states in the return value of a block: a tensor, or what a tuple or list opens with."""
    return returned[0] if isinstance(returned, tuple | list) and returned else returned


def lists_of_modules(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Paths of each `ModuleList` that is inside no other, and whose modules are made of modules."""
    for name, child in model.named_children():
        if not isinstance(child, nn.ModuleList):
            yield from lists_of_modules(child, f"{prefix}{name}.")
        elif any(True for module in child for _ in module.children()):
            yield prefix + name


def find_blocks(model: PreTrainedModel) -> list[str]:
    """Paths of the lists of blocks: those through which tokens run.

    Raises:
        LlmqatError: if there is none, or no probe pass tells which of several it is.
    """
    paths = list(lists_of_modules(model))
    if not paths:
        raise LlmqatError(f"{type(model).__name__} has no list of blocks; use --init rtn")
    return paths if len(paths) == 1 else _lists_that_run(model, paths)


def confirm_blocks(model: PreTrainedModel, paths: list[str]) -> bool:
    """Whether a probe pass ran through the blocks at `paths` as a walk does: each once, in order, on what the one
    before it returned. False if the model cannot run without values.

    Raises:
        NotInARow: if it ran otherwise.
    """
    calls = probe(model, paths)
    if calls is None:
        return False
    count = sum(1 for path in paths for _ in model.get_submodule(path).children())
    order, problem = [call.place for call in calls], ""
    if len(paths) > 1:
        problem = "lie in several lists"
    elif order != list(range(count)):
        problem = f"run in the order {order}" if len(order) <= 2 * count else f"run {len(order)} times"
    elif any(call.hidden is not before.returned for before, call in pairwise(calls)):
        problem = "do not each read what the one before returned"
    if problem:
        raise NotInARow(f"the {count} blocks of {type(model).__name__} at {' and '.join(paths)} {problem}")
    return True


def _lists_that_run(model: PreTrainedModel, paths: list[str]) -> list[str]:
    calls = probe(model, paths)
    if not calls:
        why = "cannot run without values" if calls is None else "tokens run through none of them"
        raise LlmqatError(
            f"{type(model).__name__} has several lists that could be its blocks ({', '.join(paths)}), and {why}; use "
            "--init rtn"
        )
    return list(dict.fromkeys(call.path for call in calls))


@torch.no_grad()
def probe(model: PreTrainedModel, paths: list[str]) -> list[Call] | None:
    """Run a few tokens without values through a copy of `model` without weights.

    Returns:
        the runs of the modules in the lists at `paths`, in order; None if what runs next depends on values.
    """
    calls: list[Call] = []

    def record(path: str, index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        calls.append(Call(path, index, args[0] if args else kwargs.get("hidden_states"), hidden_of(out)))

    with ExitStack() as stack:
        stack.enter_context(fake_tensors())
        try:
            shadow = fake_copy(model).eval()
            for path in paths:
                for index, module in enumerate(shadow.get_submodule(path)):  # type: ignore[arg-type]
                    module.register_forward_hook(partial(record, path, index), with_kwargs=True)
            shadow(input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.int64), use_cache=False)
        except Exception:  # a family may do anything with its inputs, and no value is there to do it with
            return None
    return calls


def fake_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of `model` made of tensors without values, inside `fake_tensors`; its experts run for any token."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    shadow = copy.deepcopy(model, memo)
    shadow.set_experts_implementation("batched_mm")  # the others look at which experts the tokens go to
    return shadow
