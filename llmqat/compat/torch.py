"""Private names of torch: dicts, casts and shards of a module, whether a backward runs, operators watched or faked, and
how often a function compiles."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn

from llmqat.compat.register import leans_on


@leans_on("torch._C._current_graph_task_id", test="tests/nn/test_static_activations.py")
def in_backward() -> bool:
    """Whether a backward is running: a forward inside is gradient checkpointing's second one."""
    return bool(torch._C._current_graph_task_id() != -1)


@leans_on("torch._dynamo.config.recompile_limit", test="tests/train/test_loop.py")
def variants_of_compiled_functions(limit: int) -> AbstractContextManager[Any]:
    """Let torch compile a function up to `limit` times inside the ``with``; after 8 by default it runs eagerly."""
    return torch._dynamo.config.patch(recompile_limit=limit)


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


@leans_on("torch.nn.Module._parameters", test="tests/nn/test_experts.py")
def with_parameters(module: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """A module that shares all with `module` but its own Parameters."""
    other = copy.copy(module)
    vars(other)["_parameters"] = dict(parameters)
    return other


@leans_on("torch.nn.Module._modules", test="tests/nn/test_native_modules.py")
def with_modules(module: nn.Module, modules: dict[str, nn.Module]) -> nn.Module:
    """A module that shares all with `module` but these submodules."""
    other = copy.copy(module)
    vars(other)["_modules"] = {**module._modules, **modules}
    return other


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


@leans_on("torch.Tensor._version", test="tests/algorithms/test_stand_ins.py")
def writes_to(tensor: Tensor) -> int:
    """How often a tensor has been written to: it is what it was while this stays the same."""
    return tensor._version


@leans_on("torch.utils._python_dispatch.TorchDispatchMode", test="tests/metrics/test_live_bytes.py")
def watching_operators(seen: Callable[[Any, Any, dict[str, Any], Any], None]) -> AbstractContextManager[Any]:
    """Call ``seen(operator, args, kwargs, result)`` after each operator that runs inside the ``with``."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = operator(*args, **(kwargs or {}))
            seen(operator, args, kwargs or {}, result)
            return result

    return Watch()


@leans_on("torch._subclasses.fake_tensor.FakeTensorMode", test="tests/forecast/test_cost.py")
def fake_tensors() -> AbstractContextManager[Any]:
    """Tensors made inside the ``with`` have shapes and dtypes, and no values: a model of them takes no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@leans_on("torch.distributed._composable_state._module_state_mapping", test="tests/test_distributed.py")
def forget_sharded(module: nn.Module) -> None:
    """Let a module that FSDP2 has sharded, and that is whole again, be sharded once more."""
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)
