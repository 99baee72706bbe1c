"""Private names of torch: the dicts of a module, its casts, and whether a backward is running."""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmqat.compat.register import leans_on


@leans_on("torch._C._current_graph_task_id", test="tests/nn/test_static_activations.py")
def in_backward() -> bool:
    """Whether a backward is running: a forward inside is gradient checkpointing's second one."""
    return bool(torch._C._current_graph_task_id() != -1)


@leans_on("torch.nn.Module._buffers", test="tests/nn/test_packed_linear.py", native=True)
def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module itself, by name: attributes are found by a slow search."""
    return module._buffers


@leans_on(
    "torch.nn.Module._modules",
    "torch.nn.Module._parameters",
    "torch.nn.Module._buffers",
    test="tests/serve/test_borrowed.py",
    native=True,
)
def members_of(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The dicts in which a module keeps its submodules, parameters and buffers."""
    return module._modules, module._parameters, module._buffers


@leans_on(
    "torch.nn.Module._forward_hooks",
    "torch.nn.Module._forward_pre_hooks",
    test="tests/serve/test_borrowed.py",
    native=True,
)
def hooks_of(module: nn.Module) -> tuple[dict[Any, Any], ...]:
    """The dicts of the hooks after and before the forward of a module."""
    return module._forward_hooks, module._forward_pre_hooks


class KeepsDtypes(nn.Module):
    """A module whose tensors keep their dtypes when its model is cast.

    ``model.to(torch.bfloat16)`` neither turns float32 masters into bfloat16 (small updates would be lost) nor changes
    the dtype in which scales are stored.
    """

    @leans_on("torch.nn.Module._apply", test="tests/nn/test_packed_linear.py")
    def __init__(self) -> None:
        """Keep masters and scales as they are when a model is cast."""
        super().__init__()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(lambda tensor: _moved(tensor, fn), recurse)
        self.cast_rest(fn)
        return self

    def cast_rest(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Cast, after everything was moved, what does follow the dtype of the model: nothing, unless overridden."""


def _moved(tensor: Tensor, fn: Callable[[Tensor], Tensor]) -> Tensor:
    """The device move of `fn` without its cast."""
    moved = fn(tensor)
    return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
