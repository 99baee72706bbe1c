"""Where a model's fused experts are, what they are called in files, and how they become Linears."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel

from llmqat.compat.transformers import save_as_it_is
from llmqat.errors import LlmqatError
from llmqat.models.architectures import known_architecture
from llmqat.models.coverage import LayerCoverage
from llmqat.nn.experts import PROJECTIONS, SplitExperts, is_fused
from llmqat.scheme import QuantScheme

Shape = tuple[int, int]


def can_split_experts(model: PreTrainedModel) -> bool:
    """Whether the family's experts can be split: its row knows the layout, and the router."""
    row = known_architecture(model)
    return row is not None and row.router is not None


def expert_layers(name: str, fused: nn.Module) -> Iterator[tuple[str, Shape]]:
    """Name and shape ``(out, in)`` of every Linear that splitting the fused module `name` gives."""
    assert isinstance(fused.down_proj, nn.Parameter)
    experts, hidden, intermediate = fused.down_proj.shape
    up, down = (intermediate, hidden), (hidden, intermediate)
    for expert in range(experts):
        for projection, shape in zip(PROJECTIONS, (up, up, down), strict=True):
            yield f"{name}.{expert}.{projection}", shape


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


def fused_experts(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The fused modules by name that can be split: none if the family has no row that says how."""
    if not can_split_experts(model):
        return {}
    return {name: module for name, module in model.named_modules() if is_fused(module)}


def split_experts(model: PreTrainedModel) -> None:
    """Replace fused experts by `SplitExperts`, in place, if the family has a row that says how."""
    for name, module in fused_experts(model).items():
        model.set_submodule(name, SplitExperts.from_fused(module))
        save_as_it_is(model)  # a Trainer's checkpoints would have other names than load_state_dict knows


@contextmanager
def experts_as_linears(model: PreTrainedModel) -> Iterator[None]:
    """Inside the ``with``, each expert is made of Linears on views of the fused Parameters: changing those in place
    changes the fused ones."""
    fused = fused_experts(model)
    try:
        for name, module in fused.items():
            model.set_submodule(name, SplitExperts.from_fused(module, copy=False))
        yield
    finally:
        for name, module in fused.items():
            model.set_submodule(name, module)


def routers(model: PreTrainedModel) -> list[str]:
    """Names of the model's routers."""
    row = known_architecture(model)
    if row is None or row.router is None:
        return []
    modules = dict(model.named_modules())
    paths = (f"{row.blocks}.{index}.{row.router}" for index in range(len(modules[row.blocks])))  # type: ignore[arg-type]
    return [path for path in paths if path in modules]


def file_name(model: PreTrainedModel, name: str) -> str:
    """The name of a tensor or module of `model` in files: as transformers saves it, and vLLM reads it."""
    row = known_architecture(model)
    for module, file in row.file_names if row else ():
        name = _renamed(name, module, file)
    return name


def module_name(model: PreTrainedModel, name: str) -> str:
    """Inverse of `file_name`."""
    row = known_architecture(model)
    for module, file in row.file_names if row else ():
        name = _renamed(name, file, module)
    return name


def _renamed(name: str, old: str, new: str) -> str:
    return f"{name}.".replace(old, new).removesuffix(".")
