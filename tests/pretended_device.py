"""A pretended device on a machine without one: a tensor that was left on the CPU, or made there, fails a test.

Tensors on it are ordinary ones in the memory of the CPU, whose storages are remembered. To whoever asks for their
device they are on `PRETENDED`, and an operator that gets one of them together with a tensor of the CPU raises, as
operators do on a GPU. What only a real one shows is not proven: kernels, rounding, memory, speed.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import graph
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from llmqat.kernels.gpu import available

PRETENDED = torch.device("xpu", 0)
CPU = torch.device("cpu")
DEVICE = Tensor.device.__get__  # type: ignore[attr-defined]
NAMING = (torch.device, torch._C._nn._parse_to)  # they name a device, and put nothing there
TO_NUMPY = (Tensor.numpy, Tensor.__array__)
aten = torch.ops.aten
# Operators that take tensors of several devices: copies, and look-ups by indices of the CPU.
CROSSING = {aten.copy_, aten._to_copy, aten.set_}


class PretendedDevice:
    """The memory of the pretended device, and who is running: see `entered`."""

    def __init__(self) -> None:
        # References that keep addresses from being used again, and nothing else alive.
        self.storages: dict[int, StorageWeakRef] = {}
        # Whether what torch itself makes now, without saying where, goes to the device: the arguments were there.
        self.inside = [False]
        self.calls, self.operators = _Calls(self), _Operators(self)

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is on the device."""
        with torch._C.DisableTorchFunction():
            return not tensor.is_meta and tensor.untyped_storage()._cdata in self.storages

    def place(self, tensor: Tensor, here: bool) -> None:
        """Count the storage of `tensor` to the device, or to the CPU."""
        with torch._C.DisableTorchFunction():
            if tensor.is_meta:
                return
            storage = tensor.untyped_storage()
            key = storage._cdata
            if here and key not in self.storages:
                self.storages[key] = StorageWeakRef(storage)
            elif not here:
                self.storages.pop(key, None)

    @contextmanager
    def running(self, inside: bool) -> Iterator[None]:
        """Run an operator of torch whose arguments are on the device, or not."""
        self.inside.append(inside)
        try:
            yield
        finally:
            self.inside.pop()


class _Calls(TorchFunctionMode):
    """Sees the functions of torch as Python calls them: what says on which device something is to be."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device, kwargs = self.device, kwargs or {}
        if function == DEVICE:
            return PRETENDED if device.holds(args[0]) else function(*args)
        if function in NAMING or getattr(function, "__name__", None) == "__get__":
            return function(*args, **kwargs)
        held = any(map(device.holds, _tensors(args, kwargs.values())))
        if function in TO_NUMPY and held:
            raise TypeError(f"cannot convert a tensor on {PRETENDED} to numpy; use Tensor.cpu() first")
        target = _target(function, args, kwargs, device)
        args = tuple(map(_on_cpu, args))
        kwargs = {name: _on_cpu(value) for name, value in kwargs.items()}
        with device.running(held if target is None else target == PRETENDED):
            result = function(*args, **kwargs)
        if function is Tensor.__deepcopy__:  # copies the storage, by no operator
            target = PRETENDED if held else CPU
        return result if target is None else self.moved(result, target)

    def moved(self, value: Any, target: torch.device) -> Any:
        """`value` on `target`: a copy, if it is a tensor and elsewhere."""
        if not isinstance(value, Tensor) or self.device.holds(value) == (target == PRETENDED):
            return value
        copy = value.clone()
        self.device.place(copy, target == PRETENDED)
        return copy


def _target(function: Any, args: Any, kwargs: dict[str, Any], device: PretendedDevice) -> torch.device | None:
    """The device that a call names, if it does."""
    named = [kwargs["device"]] if kwargs.get("device") is not None else []
    if function is Tensor.cpu:
        named = [CPU]
    elif function is Tensor.to and args[1:]:
        if isinstance(args[1], Tensor):
            return PRETENDED if device.holds(args[1]) else CPU
        named += [value for value in args[1:] if isinstance(value, torch.device | str)]
    named = [torch.device(value) for value in named]
    assert all(one.type in ("cpu", "meta", PRETENDED.type) for one in named), named
    return named[0] if named and named[0].type != "meta" else None


def _tensors(*values: Iterable[Any]) -> Iterator[Tensor]:
    """The tensors among `values`, and in lists and tuples among them."""
    for value in chain(*values):
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _on_cpu(value: Any) -> Any:
    """An argument as torch gets it: the pretended device is the CPU."""
    if isinstance(value, torch.device) and value.type == PRETENDED.type:
        return CPU
    return "cpu" if isinstance(value, str) and value.startswith(PRETENDED.type) else value


class _Operators(TorchDispatchMode):
    """Sees the operators that run: where their results are, and that their arguments are in one place."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs.values()))
        held = [self.device.holds(tensor) for tensor in tensors]
        if any(held) and not all(held) and operator.overloadpacket not in CROSSING:
            places = [PRETENDED if here else CPU for here in held]
            shapes = ", ".join(f"{tuple(t.shape)} on {place}" for t, place in zip(tensors, places, strict=True))
            raise RuntimeError(f"{operator} expects all tensors on one device, got {shapes}")
        result = operator(*args, **kwargs)
        if held[0] if held else self.device.inside[-1]:
            for tensor in _tensors([result]):
                self.device.place(tensor, True)
        return result


@contextmanager
def entered(patch: pytest.MonkeyPatch) -> Iterator[PretendedDevice]:
    """A machine that has the pretended device, until the ``with`` ends."""
    device = PretendedDevice()
    patch.setattr(torch.accelerator, "is_available", lambda: True)
    patch.setattr(torch.accelerator, "device_count", lambda: 1)
    for name in ("current_device_index", "max_memory_allocated"):
        patch.setattr(torch.accelerator, name, lambda *_: 0)
    for name in ("set_device_index", "synchronize", "reset_peak_memory_stats"):
        patch.setattr(torch.accelerator, name, lambda *_: None)
    patch.setattr(torch.accelerator, "device_index", lambda *_: nullcontext())
    patch.setattr(torch.xpu, "get_rng_state", lambda: torch.zeros(8, dtype=torch.uint8))
    patch.setattr(torch.xpu, "set_rng_state", lambda state: None)
    stream = SimpleNamespace(is_capturing=lambda: False)  # asked by optimizers
    patch.setattr(torch.accelerator, "current_stream", lambda *_: stream)
    patch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device(PRETENDED.type))
    # Gradient checkpointing compares the devices of tensors where no mode of torch sees who asks.
    patch.setitem(checkpoint._allowed_determinism_checks_to_fns, "default", lambda _: None)
    # The interpreter would run the kernels, of GPUs whose tensors numpy cannot read.
    patch.setattr(available, "_missing_on", lambda _: "it is pretended")
    _let_autocast_be_that_of_the_cpu(patch)
    _let_gradients_be_seen(patch, device)
    _let_groups_tell_the_device(patch, device)
    with device.calls, device.operators:
        yield device


def _let_autocast_be_that_of_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """Autocast of the pretended device is that of the CPU, which computes."""
    start = torch.autocast.__init__

    def begin(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        start(self, "cpu", *args, **kwargs)

    patch.setattr(torch.autocast, "__init__", begin)
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        ask: Callable[[str], Any] = getattr(torch, name)
        patch.setattr(torch, name, lambda *_, ask=ask: ask("cpu"))


def _let_gradients_be_seen(patch: pytest.MonkeyPatch, device: PretendedDevice) -> None:
    """What autograd itself makes is on the device, and the backwards of this project are seen, too."""
    run = graph._engine_run_backward

    def seen(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        with device.running(any(map(device.holds, tensors))), device.calls:
            return run(tensors, *args, **kwargs)

    for module in (torch.autograd, graph):
        patch.setattr(module, "_engine_run_backward", seen)


def _let_groups_tell_the_device(patch: pytest.MonkeyPatch, device: PretendedDevice) -> None:
    """Lists of tensors that optimizers treat together are sorted by the device that they tell Python."""
    group = torch._C._group_tensors_by_device_and_dtype

    def grouped(*args: Any) -> Any:
        groups = group(*args).items()
        return {(PRETENDED if device.holds(g[0][0][0]) else key[0], key[1]): g for key, g in groups}

    patch.setattr(torch._C, "_group_tensors_by_device_and_dtype", grouped)
