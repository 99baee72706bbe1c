"""Which linear layers another module can take the place of: those that are called, and whose weight nobody else reads.

A layer on its grid has the weight of its forward nowhere but in its forward. A parent that reads `weight` itself
(Mamba's `dt_proj`) would go on with the float weight in training, and find none in a packed model.
"""

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from llmqat.compat.torch import fake_tensors, hooks_of
from llmqat.compat.transformers import makes_weights
from llmqat.errors import LlmqatError
from llmqat.models.looking import fake_copy
from llmqat.nn.linear_like import LINEAR_LAYERS
from llmqat.nn.lora import LoraFakeQuantLinear

PROBE_TOKENS = 4
PARTS = ("weight", "bias")
READ = "its parent reads its weight"


def check_merged(model: nn.Module) -> None:
    """Adapters of peft that llmqat did not put into a quantizer have to be merged before anything is quantized.

    Raises:
        LlmqatError: naming the first ones.
    """
    adapted = [
        name
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, LoraFakeQuantLinear)
    ]
    if adapted:
        raise LlmqatError(
            f"this model has adapters of peft that are not merged ({', '.join(adapted[:3])}); call merge_and_unload() "
            "of the PeftModel first, and add_lora after prepare if they are to train on"
        )


def obstacles(model: PreTrainedModel) -> dict[str, str]:
    """Linear layers that no other module can take the place of, by name, with the reason."""
    linear: dict[str, nn.Module] = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR_LAYERS)}
    found = {name: reason for name, module in linear.items() if (reason := _own_reason(module))}
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    found |= {name: "a module of several names" for name, module in linear.items() if len(names[id(module)]) > 1}
    uses = Counter(id(module.weight) for module in linear.values())
    found |= {name: "another layer has the same weight" for name, m in linear.items() if uses[id(m.weight)] > 1}
    read = _read_in_a_forward(model, linear)
    if read is None:
        read = set(_read_in_source(model))
    return {**{name: READ for name in linear if name in read}, **found}


def _own_reason(module: nn.Module) -> str:
    """Why a layer is more than its weight and bias; empty if it is not."""
    kind = type(module)
    if is_parametrized(module) or "weight" not in dict(module.named_parameters(recurse=False)):
        return "its weight is computed from other parameters"
    plain = kind.forward in (nn.Linear.forward, Conv1D.forward) or _computes_linear(kind)  # type: ignore[arg-type]
    if not plain or "forward" in module.__dict__:
        return f"a {kind.__name__} with a forward of its own"
    if any(hooks_of(module)):
        return "it has hooks, which would be lost"
    return ""


@lru_cache(maxsize=64)
def _computes_linear(kind: type) -> bool:
    """Whether a forward that a subclass of Linear has of its own (Falcon's) gives what that of Linear does; tried."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            layer, x = kind(8, 4, bias=True).double(), torch.randn(3, 8, dtype=torch.float64)
            equal = torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
            return equal and layer.__dict__.keys() == nn.Linear(8, 4).__dict__.keys()
    except Exception:  # made otherwise than a Linear
        return False


def _read_in_a_forward(model: PreTrainedModel, linear: Collection[str]) -> set[str] | None:
    """Layers whose weight or bias is read by others while a few tokens run, without values if the model has none; None
    if the model cannot run them."""
    with ExitStack() as stack:
        if any(parameter.is_meta for parameter in model.parameters()):
            stack.enter_context(fake_tensors())
            try:
                model = fake_copy(model)
            except Exception:  # a module that cannot be copied
                return None
        return _read_while_running(model, {id(model.get_submodule(name)): name for name in linear})


def _read_while_running(model: PreTrainedModel, names: dict[int, str]) -> set[str] | None:
    """Names of the layers, given by id, whose weight or bias is read by others in a forward; None if it fails."""
    training = {module: module.training for module in model.modules()}
    seen: set[str] = set()
    layers = [module for module in model.modules() if id(module) in names]
    try:
        with watched(layers, lambda module: seen.add(names[id(module)])), torch.no_grad():
            model.eval()
            ids = torch.arange(PROBE_TOKENS, device=model.device)[None] % max(
                1, model.config.get_text_config().vocab_size
            )
            model(input_ids=ids)
    except Exception:  # it wants other inputs than tokens; its source is looked at instead
        return None
    finally:
        for module, flag in training.items():
            module.training = flag
    return seen


@contextmanager
def watched(modules: list[nn.Module], on_read: Any) -> Iterator[None]:
    """Call ``on_read(module)`` when a weight or bias of one of `modules` is read from outside of its own forward, until
    the ``with`` ends."""
    kinds = {id(module): type(module) for module in modules}
    made: dict[type, type] = {}
    running: set[int] = set()
    try:
        for module in modules:
            kind = type(module)
            made[kind] = made.get(kind) or _watching(kind, running, on_read)
            module.__class__ = made[kind]
        yield
    finally:
        for module in modules:
            module.__class__ = kinds[id(module)]


def _watching(kind: type, running: set[int], on_read: Any) -> type:
    def read(self: nn.Module, name: str) -> Any:
        if name in PARTS and id(self) not in running:
            on_read(self)
        return kind.__getattr__(self, name)  # type: ignore[attr-defined]

    def forward(self: nn.Module, *args: Any, **options: Any) -> Any:
        running.add(id(self))
        try:
            return kind.forward(self, *args, **options)  # type: ignore[attr-defined]
        finally:
            running.discard(id(self))

    return type(kind.__name__, (kind,), {"__getattr__": read, "forward": forward, "__module__": kind.__module__})


def _read_in_source(model: PreTrainedModel) -> Iterator[str]:
    """Layers whose weight or bias the source of a parent's methods reads: ``self.dt_proj.weight``."""
    for prefix, module in model.named_modules():
        for path in {path for base in type(module).__mro__ for path in _paths_read(base)}:
            try:
                child = module.get_submodule(path)
            except AttributeError:
                continue
            if isinstance(child, LINEAR_LAYERS):
                yield f"{prefix}.{path}" if prefix else path


@lru_cache(maxsize=1024)  # finding and parsing the source of a class takes a tenth of a second
def _paths_read(kind: type) -> tuple[str, ...]:
    """Paths below ``self`` whose weight or bias a method of `kind` itself reads, other than those that make and fill
    it."""
    if kind.__module__.startswith("torch.") or not issubclass(kind, nn.Module):
        return ()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):
        return ()
    methods = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and not makes_weights(node.name)]
    return tuple(path for method in methods for node in ast.walk(method) if (path := _path_of(node)))


def _path_of(node: ast.AST) -> str:
    """``a.b`` of an expression ``self.a.b.weight``; empty for any other."""
    if not isinstance(node, ast.Attribute) or node.attr not in PARTS:
        return ""
    parts, inner = [], node.value
    while isinstance(inner, ast.Attribute):
        parts.append(inner.attr)
        inner = inner.value
    return ".".join(reversed(parts)) if isinstance(inner, ast.Name) and inner.id == "self" else ""
