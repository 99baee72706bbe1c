"""Find where SmoothQuant is exact in a family without a row, by trying each writer with its readers on one block.

Readers of one tensor are linears that are given the same numbers. A norm that returns it may be their writer, or any
linear that runs before them and writes as many channels, or a head's values for several of theirs. Experts, which are
given some of the tokens, read what their router reads and the linears beside it. A pair is a site if the block returns
the same hidden states after random powers of two were moved from the one to the others: whatever else reads these
channels, or bends them on the way, would show.
"""

from collections import Counter
from collections.abc import Container, Iterator
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llmqat.algorithms.blocks import BlockInputs, eval_mode
from llmqat.algorithms.fold import TOLERANCE, Fold
from llmqat.errors import shortened_list
from llmqat.models.architectures import blocks_of
from llmqat.models.smooth_sites import Site, folds_of
from llmqat.nn.experts import SplitExperts
from llmqat.nn.linear_like import LINEAR_LAYERS, linear_shape
from llmqat.progress import log

TRIAL_TOKENS = 8

Group = tuple[Tensor, list[str]]


@torch.no_grad()
def find_sites(model: PreTrainedModel, ids: Tensor) -> list[tuple[Site, ...]]:
    """The sites of each block, in order; those of blocks of one kind are tried on the first.

    Args:
        model: float, its experts apart; every weight is put back.
        ids: token ids ``(batch, length)``, of which a few are run.
    """
    blocks, config = blocks_of(model), model.config.get_text_config()
    uses = Counter(id(parameter) for module in model.modules() for parameter in module.parameters(recurse=False))
    apart = {id(parameter) for parameter in model.parameters() if uses[id(parameter)] == 1}
    known: dict[tuple[Any, ...], tuple[Site, ...]] = {}
    found = []
    with eval_mode(model):
        inputs = BlockInputs.capture(model, list(blocks), [ids[:1, :TRIAL_TOKENS]])
        for block in blocks:
            shapes = ((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())
            kind = type(block), *shapes
            if kind not in known:
                known[kind] = tuple(_sites_of(block, inputs, config, apart))
                _log(block, known[kind])
            found.append(known[kind])
            inputs.advance(block)
    return found


def _log(block: nn.Module, sites: tuple[Site, ...]) -> None:
    """Say what was found in a kind of block, and whose inputs stay as they are."""
    pairs = ", ".join(f"{site.source} -> {' '.join(site.readers)}" for site in sites)
    read = [path for site in sites for path in (*site.readers, *site.routers)]
    linears = [name for name, module in block.named_modules() if isinstance(module, LINEAR_LAYERS)]
    others = [name for name in linears if not any(fnmatchcase(name, path) for path in read)]
    left = f"; inputs of {shortened_list(others)} stay as they are" if others else ""
    log(f"SmoothQuant in {type(block).__name__}, found by trying: {pairs or 'nothing'}{left}")


def _sites_of(block: nn.Module, inputs: BlockInputs, config: Any, apart: Container[int]) -> Iterator[Site]:
    right, groups, norms = _watch(block, inputs, apart)
    for place, (tensor, readers) in enumerate(groups):
        before = [name for _, names in groups[:place] for name in names]
        norm = next((name for written, name in norms if _are_same(written, tensor)), None)
        for site in _candidates(tuple(readers), norm, before):
            if _is_exact(block, inputs, site, config, right):
                yield site
                break
    for name, module in block.named_modules():
        if isinstance(module, SplitExperts):
            around = _around_experts(block, name, module, groups, norms)
            within = [Site(f"{name}.*.up_proj", (f"{name}.*.down_proj",))]
            for candidates in (around, within):
                yield from [site for site in candidates if _is_exact(block, inputs, site, config, right)][:1]


def _candidates(readers: tuple[str, ...], norm: str | None, linears: list[str]) -> Iterator[Site]:
    """Writers that `readers` may have: the norm that returned what they read, or a linear before them."""
    if norm is not None:
        yield from (Site(norm, readers, offset=offset) for offset in (0.0, 1.0))
    else:
        yield from (Site(linear, readers, heads=heads) for linear in reversed(linears) for heads in (False, True))


def _around_experts(
    block: nn.Module, name: str, experts: SplitExperts, groups: list[Group], norms: list[tuple[Tensor, str]]
) -> Iterator[Site]:
    """Candidates whose readers are the experts `name`, their router, and the linears that read what a norm returned."""
    first = [f"{name}.*.{own}" for own in ("gate_proj", "up_proj") if getattr(experts[0], own) is not None]
    _, hidden = linear_shape(experts.get_submodule("0.up_proj"))
    parent = name.rpartition(".")[0]
    routers = [
        path
        for path, module in block.get_submodule(parent).named_modules(prefix=parent)
        if not path.startswith(name) and getattr(getattr(module, "weight", None), "shape", ()) == (len(experts), hidden)
    ]
    for written, norm in norms:
        beside = [path for tensor, names in groups if _are_same(tensor, written) for path in names]
        readers = (*first, *(path for path in beside if path not in routers))
        yield from (Site(norm, readers, tuple(routers), offset=offset) for offset in (0.0, 1.0))


def _are_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are views of the same numbers, in rows of one length."""
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel() and one.shape[-1] == other.shape[-1]


def _watch(
    block: nn.Module, inputs: BlockInputs, apart: Container[int]
) -> tuple[Tensor, list[Group], list[tuple[Tensor, str]]]:
    """Run a block: its hidden states, its linears by the tensor that they read, in running order, and what each of its
    norms returns.

    Experts, which are given some of the tokens, are left out, and modules whose weight is not one of those `apart`,
    which no other module has. All tensors are kept, or another could lie in the place of one that is gone.
    """
    groups: list[Group] = []
    norms: list[tuple[Tensor, str]] = []

    def read(name: str, x: Tensor) -> None:
        names = next((names for tensor, names in groups if _are_same(tensor, x)), None)
        if names is None:
            groups.append((x, [name]))
        else:
            names.append(name)

    def wrote(name: str, y: Any) -> None:
        if isinstance(y, Tensor):
            norms.append((y, name))

    experts = tuple(f"{name}." for name, module in block.named_modules() if isinstance(module, SplitExperts))
    handles = []
    for name, module in block.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if id(weight) not in apart or name.startswith(experts):
            continue
        if isinstance(module, LINEAR_LAYERS):
            handles.append(module.register_forward_pre_hook(lambda _, args, name=name: read(name, args[0])))
        elif weight is not None and weight.ndim == 1:
            handles.append(module.register_forward_hook(lambda _, __, y, name=name: wrote(name, y)))
    try:
        return inputs.run(block, 0), groups, norms
    finally:
        for handle in handles:
            handle.remove()


def _folds(block: nn.Module, site: Site, config: Any) -> list[Fold]:
    """The folds of a candidate, one for each expert that writes; none where sizes do not fit."""
    try:
        folds = list(folds_of(block, "", (site,), config, lambda _: None))
    except (AttributeError, ValueError, ZeroDivisionError):  # a config that has no heads, or others for each layer
        return []
    return folds if all(map(_fits, folds)) else []


def _fits(fold: Fold) -> bool:
    channels = len(fold.written[0])
    fits = fold.head_dim and channels % fold.head_dim == 0 and all(len(tensor) == channels for tensor in fold.written)
    return bool(fits and all(tensor.shape[-1] == channels * fold.queries for tensor in fold.read))


def _is_exact(block: nn.Module, inputs: BlockInputs, site: Site, config: Any, right: Tensor) -> bool:
    """Whether the block returns the same after a fold of random powers of two, which is taken back; of all experts at
    once, some of which tokens reach."""
    folds = _folds(block, site, config)
    if not folds:
        return False
    tensors = [tensor for fold in folds for tensor in (*fold.written, *fold.read)]
    saved = [tensor.clone() for tensor in tensors]
    random = torch.Generator().manual_seed(0)
    try:
        for fold in folds:
            s = torch.randint(-2, 3, (len(fold.written[0]),), generator=random).float().exp2().to(right.device)
            fold.apply(fold.representable(s, fold.written[0].dtype))
        change = (inputs.run(block, 0) - right).abs().max()
        return bool(change <= TOLERANCE * right.abs().max())
    finally:
        for tensor, old in zip(tensors, saved, strict=True):
            tensor.copy_(old)
