"""Where a model's fused experts are, what they are called in files, and how they become Linears."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.compat.transformers import expert_names, save_as_it_is
from llmqat.errors import LlmqatError
from llmqat.models.architectures import known_architecture
from llmqat.models.coverage import LayerCoverage
from llmqat.nn.expert_layout import Layout, is_fused
from llmqat.nn.experts import SplitExperts, layout_of
from llmqat.scheme import QuantScheme

Shape = tuple[int, int]
EXPERT = re.compile(r"\.experts\.\d+\.")
_NAMES: dict[type, dict[str, str]] = {}  # of kinds of models, as transformers converts them


def expert_layers(name: str, fused: nn.Module, layout: Layout) -> Iterator[tuple[str, Shape]]:
    """Name and shape ``(out, in)`` of every Linear that splitting the fused module `name` gives."""
    weights = dict(fused.named_parameters())
    for expert in range(len(weights["down_proj"])):
        for projection, (weight, _) in layout.apart(weights, expert).items():
            yield f"{name}.{expert}.{projection}", (weight.shape[0], weight.shape[1])


def fused_shapes(name: str, fused: nn.Module) -> Iterator[tuple[str, Shape]]:
    """Name and shape, experts on top of each other, of the 3-D Parameters of a fused module that stays as it is."""
    for own, parameter in fused.named_parameters(name, recurse=False):
        if parameter.ndim == 3:
            yield own, (parameter.shape[0] * parameter.shape[1], parameter.shape[2])


def check_experts(layers: Iterable[LayerCoverage]) -> None:
    """One scheme for all experts of a model, though those of some blocks may be float: so the file format has it, and
    other readers would take one expert's codes for another's without a word.

    Raises:
        LlmqatError: if an override tells experts apart.
    """
    by_block: dict[str, set[QuantScheme | None]] = {}
    for layer in layers:
        block, expert, _ = layer.name.partition(".experts.")
        if expert:
            by_block.setdefault(block, set()).add(layer.scheme)
    schemes = set().union(*by_block.values()) - {None}
    if len(schemes) > 1 or any(len(own) > 1 for own in by_block.values()):
        found = ", ".join(sorted(str(scheme or "float") for scheme in set().union(*by_block.values())))
        raise LlmqatError(
            f"overrides give experts several schemes ({found}); transformers and vLLM know one for all experts: "
            "name them all, as in 'experts:bits=8', or those of a block to keep them float, as in "
            "'layers.0.mlp.experts:float'"
        )


def fused_experts(model: PreTrainedModel) -> dict[str, Layout]:
    """The fused modules that can be split, by name, with their layout."""
    layouts = ((name, layout_of(module)) for name, module in model.named_modules() if is_fused(module))
    return {name: layout for name, layout in layouts if layout is not None}


def experts_in_words(model: PreTrainedModel) -> str:
    """How many fused experts a model has, and how they lie in their Parameters; empty for none that can be split."""
    layouts = fused_experts(model)
    if not layouts:
        return ""
    layers = Counter((len(model.get_parameter(f"{name}.down_proj")), str(layout)) for name, layout in layouts.items())
    kinds = (
        f"{count} experts in each of {layer} layers{how and f' ({how})'}" for (count, how), layer in layers.items()
    )
    return f"{', '.join(kinds)}, confirmed by a trial"


def names_in_files(model: PreTrainedModel) -> tuple[tuple[str, str], ...]:
    """Parts of the names of modules and what they are in files, patterns of an expert's."""
    row = known_architecture(model)
    if row is not None and row.file_names:
        return row.file_names
    return tuple((f".{own}.", f".{file}.") for own, file in _names(model).items())


def reads_experts(model: PreTrainedModel) -> bool:
    """Whether transformers reads each expert's tensors from files; else those of a block lie in one, and it does not
    know packed experts of the family."""
    return known_architecture(model) is not None or bool(_names(model))


def _names(model: PreTrainedModel) -> dict[str, str]:
    kind = type(model)
    if kind not in _NAMES:
        _NAMES[kind] = expert_names(model)
    return _NAMES[kind]


def split_experts(model: PreTrainedModel) -> None:
    """Replace the fused experts that can be split by `SplitExperts`, in place."""
    for name, layout in fused_experts(model).items():
        model.set_submodule(name, SplitExperts.from_fused(model.get_submodule(name), layout))
        save_as_it_is(model)  # a Trainer's checkpoints would have other names than load_state_dict knows


@contextmanager
def experts_as_linears(model: PreTrainedModel) -> Iterator[None]:
    """Inside the ``with``, each expert is made of Linears on views of the fused Parameters: changing those in place
    changes the fused ones."""
    layouts = fused_experts(model)
    fused = {name: model.get_submodule(name) for name in layouts}
    try:
        for name, layout in layouts.items():
            model.set_submodule(name, SplitExperts.from_fused(fused[name], layout, copy=False))
        yield
    finally:
        for name, module in fused.items():
            model.set_submodule(name, module)


def routers(model: PreTrainedModel) -> list[str]:
    """Names of the model's routers: what lies beside experts, and writes a number for each of them."""
    modules, found = dict(model.named_modules()), []
    for name, module in modules.items():
        if isinstance(module, SplitExperts) or is_fused(module):
            count = len(module) if isinstance(module, SplitExperts) else len(module.get_parameter("down_proj"))
            block = name.rpartition(".")[0]
            for path, other in modules[block].named_modules(prefix=block):
                weight = getattr(other, "weight", None)
                if not path.startswith(name) and isinstance(weight, Tensor) and weight.shape[:-1] == (count,):
                    found.append(path)
    return found


def file_name(model: PreTrainedModel, name: str) -> str:
    """The name of a tensor or module of `model` in files: as transformers saves it, and vLLM reads it."""
    return _renamed(name, names_in_files(model) if EXPERT.search(name) or known_architecture(model) else ())


def module_name(model: PreTrainedModel, name: str) -> str:
    """Inverse of `file_name`."""
    names = names_in_files(model) if EXPERT.search(name) or known_architecture(model) else ()
    return _renamed(name, [(file, module) for module, file in names])


def _renamed(name: str, parts: Iterable[tuple[str, str]]) -> str:
    for old, new in parts:
        name = f"{name}.".replace(old, new).removesuffix(".")
    return name
