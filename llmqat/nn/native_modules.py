"""Norms, gates and rotary embeddings of transformers models by the compiled kernels, for as long as one trains.

No family has a line here: a module is taken when, tried on small random inputs, it computes what the kernels do.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from llmqat.compat.rotary import Rotary, rotary_by
from llmqat.kernels import gates, norms, rotary, training
from llmqat.nn.native_trials import Gating, convention_of, gating_of, rotary_features

Forward = Callable[..., Any]


@contextmanager
def native_modules(*models: nn.Module) -> Iterator[None]:
    """Run RMSNorms, gates and rotary embeddings of models by the compiled kernels inside the ``with``.

    Results are those of the modules, to rounding; calls that the kernels do not take run as they did. Without compiled
    kernels, or with ``LLMQAT_TRAINING=torch``, nothing changes.

    Args:
        models: any; modules that belong to several of them count once.
    """
    with ExitStack() as stack:
        if training.library() is not None:
            for module in {id(module): module for model in models for module in model.modules()}.values():
                forward = _native_forward(module)
                if forward is not None:
                    stack.enter_context(forward_by(module, forward))
            stack.enter_context(rotary_by(_native_rotary, models))
        yield


@contextmanager
def forward_by(module: nn.Module, forward: Forward) -> Iterator[None]:
    """Shadow the forward of a module's class."""
    module.forward = forward
    try:
        yield
    finally:
        if vars(module).get("forward") is forward:
            del module.forward


def _native_forward(module: nn.Module) -> Forward | None:
    """The forward of a module by the kernels; None leaves its own, and always where somebody has replaced that."""
    if "forward" in vars(module):
        return None
    if (convention := convention_of(module)) is not None:
        return partial(_norm, module, module.forward, convention)
    if (gating := gating_of(module)) is not None:
        return partial(_mlp, module, module.forward, gating)
    return None


def _norm(module: nn.Module, own: Forward, convention: norms.Convention, *args: Any, **kwargs: Any) -> Any:
    weight = module.weight
    if kwargs or len(args) != 1 or not isinstance(weight, Tensor) or not norms.takes(args[0], weight):
        return own(*args, **kwargs)
    return norms.rms_norm(args[0], weight, convention)


def _mlp(module: Any, own: Forward, gating: Gating, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 1:
        return own(*args, **kwargs)
    if gating.halves:
        gate_up = module.gate_up_proj(args[0])
        return module.down_proj(_gated_halves(gate_up, gating, module))
    gate, up = module.gate_proj(args[0]), module.up_proj(args[0])
    return module.down_proj(_gated(gate, up, gating, module))


def _gated(gate: Tensor, up: Tensor, gating: Gating, module: nn.Module) -> Tensor:
    if gates.takes(gate, up):
        return gates.gated(gate, up, gating.activation)
    product: Tensor = getattr(module, gating.function)(gate) * up
    return product


def _gated_halves(gate_up: Tensor, gating: Gating, module: nn.Module) -> Tensor:
    if gates.takes_halves(gate_up):
        return gates.gated_halves(gate_up, gating.activation)
    gate, up = gate_up.chunk(2, -1)
    product: Tensor = getattr(module, gating.function)(gate) * up
    return product


def _native_rotary(own: Rotary) -> Rotary | None:
    """A stand-in for a function of transformers that rotates queries and keys; None leaves that one."""
    features = rotary_features(own)
    return partial(_rotate, own, features == "some") if features else None


def _rotate(own: Rotary, partly: bool, *args: Any, **kwargs: Any) -> Any:
    if kwargs or len(args) != 4 or not all(isinstance(value, Tensor) for value in args):
        return own(*args, **kwargs)
    q, k, cosine, sine = args
    whole = q.shape[-1] == k.shape[-1] == cosine.shape[-1]
    if not ((whole or partly) and rotary.takes(q, cosine, sine) and rotary.takes(k, cosine, sine)):
        return own(*args, **kwargs)
    return rotary.rotate(q, cosine, sine), rotary.rotate(k, cosine, sine)
