"""Adapters of experts as peft stores them: a pair of factors for all experts of a fused Parameter.

Here every projection of an expert has factors of its own, as any layer has. A model that transformers loads has
Parameters of all experts, which peft adapts as `target_parameters`: put side by side the factors say the same of these,
and plain peft loads what was trained here.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from llmqat.errors import LlmqatError
from llmqat.models.patcher import transformers_model
from llmqat.nn.expert_layout import Layout
from llmqat.nn.experts import PROJECTIONS, SplitExperts

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."  # of names in peft's files
Factors = tuple[Tensor, Tensor]  # A ``(r, in)`` and B ``(out, r)``


class FusedAdapters(NamedTuple):
    """The adapters of a fused Parameter.

    Attributes:
        name: of the Parameter in the model that transformers loads.
        place: of its factors in files. peft wraps a module once for each Parameter: what lies in front of the
            activation is innermost.
        layout: of the experts.
        layers: names of the experts' layers, by projection.
    """

    name: str
    place: str
    layout: Layout
    layers: dict[str, list[str]]

    @property
    def names(self) -> Iterator[str]:
        """Names of all the layers."""
        return itertools.chain(*self.layers.values())

    @property
    def kind(self) -> str:
        """How the names of such Parameters end in all blocks."""
        return ".".join(self.name.split(".")[-2:])

    def together(self, apart: Mapping[str, Factors]) -> Factors:
        """Factors for peft, of those of the layers: along r the projections lie side by side, each in rows of its own,
        then r and experts as one."""
        a = torch.cat([torch.stack([apart[layer][0] for layer in own]) for own in self.layers.values()], 1)
        of_each = [torch.stack([apart[layer][1] for layer in own]) for own in self.layers.values()]
        b = a.new_zeros(len(a), sum(own.shape[1] for own in of_each), a.shape[1])
        for own, (_, rows, columns) in zip(of_each, self._parts(b), strict=True):
            b[:, rows, columns] = own
        if self.layout.swapped:
            a, b = b.mT, a.mT
        return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()

    def apart(self, a: Tensor, b: Tensor) -> dict[str, Factors]:
        """Inverse of `together`.

        Raises:
            LlmqatError: if these are no factors of so many experts, or a projection has none of its own.
        """
        experts = len(next(iter(self.layers.values())))
        if not len(a) % (experts * len(self.layers)):
            first, second = a.unflatten(0, (experts, -1)), b.unflatten(1, (-1, experts)).permute(2, 0, 1)
            if self.layout.swapped:
                first, second = second.mT, first.mT
            parts = [(own, first[:, r], second[:, rows, r]) for own, rows, r in self._parts(second)]
            if sum(int(own_b.count_nonzero()) for _, _, own_b in parts) == int(second.count_nonzero()):
                return {
                    layer: (own_a[expert].contiguous(), own_b[expert].contiguous())
                    for projection, own_a, own_b in parts
                    for expert, layer in enumerate(self.layers[projection])
                }
        raise LlmqatError(
            f"the adapter of {self.name} has factors {list(a.shape)} and {list(b.shape)}, which are not those of "
            f"{experts} experts with their own for each of {', '.join(self.layers)}; load one that llmqat saved"
        )

    def _parts(self, b: Tensor) -> list[tuple[str, slice, slice]]:
        """Each projection with its rows, and its columns, in a B of an expert ``(experts, out, r)``."""
        rows = self.layout.rows(self.name.rpartition(".")[2], b.shape[1])
        r = b.shape[2] // len(rows)
        return [(name, own, slice(i * r, (i + 1) * r)) for i, (name, own) in enumerate(rows.items())]


def store_together(model: nn.Module, directory: Path) -> None:
    """Make adapters of experts, in a `directory` that peft wrote from `model`, those of fused Parameters."""
    tensors: dict[str, Tensor] = load_file(directory / WEIGHTS)
    stored = [fused for fused in _fused_adapters(model) if _names(next(fused.names))[0] in tensors]
    if not stored:
        return
    for fused in stored:
        apart = {layer: _pop(tensors, layer) for layer in fused.names}
        tensors.update(zip(_names(fused.place), fused.together(apart), strict=True))
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    layers = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in tensors} - {own.place for own in stored}
    config = json.loads((directory / CONFIG).read_text("utf-8")) | _targets_together(stored, layers)
    for key, value in (("rank_pattern", config["r"]), ("alpha_pattern", config["lora_alpha"])):
        config[key] |= {fused.kind: 2 * value for fused in stored if len(fused.layers) == 2}
    (directory / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")


def targets_apart(config: LoraConfig, model: nn.Module) -> None:
    """Make targets of a config that `store_together` wrote those of a model with split experts, in place.

    Raises:
        LlmqatError: if the model does not have them.
    """
    if not config.target_parameters:
        return
    known, modules = {fused.name: fused for fused in _fused_adapters(model)}, set(config.target_modules or ())
    for target in config.target_parameters:
        layer, _, own = target.rpartition(".")
        if target not in known and own != "weight":
            raise LlmqatError(
                f"the adapter is for experts in {target}, which this model does not have; prepare the model "
                "that it was trained on"
            )
        modules.update(known[target].names if target in known else [layer])
    config.target_modules, config.target_parameters = sorted(modules), None
    for pattern in (config.rank_pattern or {}, config.alpha_pattern or {}):
        for fused in known.values():
            pattern.pop(fused.kind, None)


def tensors_apart(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Adapters of the layers of split experts, of those of fused Parameters, by their names in files.

    Raises:
        LlmqatError: see `FusedAdapters.apart`.
    """
    tensors = dict(tensors)
    for fused in _fused_adapters(model):
        if _names(fused.place)[0] in tensors:
            for layer, factors in fused.apart(*_pop(tensors, fused.place)).items():
                tensors.update(zip(_names(layer), factors, strict=True))
    return tensors


def _targets_together(stored: Iterable[FusedAdapters], layers: set[str]) -> dict[str, list[str]]:
    """Targets of peft: Parameters that `stored` names, and `layers`.

    Layers that are called like projections of experts are targets by Parameter, too: peft takes modules of such names
    for experts, in families that it knows.
    """
    beside = {layer for layer in layers if layer.endswith(PROJECTIONS)}
    parameters = [*(fused.name for fused in stored), *(f"{layer}.weight" for layer in beside)]
    return {"target_modules": sorted(layers - beside), "target_parameters": sorted(parameters)}


def _fused_adapters(model: nn.Module) -> Iterator[FusedAdapters]:
    """The adapters of all fused Parameters that a model would have if its experts were not split."""
    for path, experts in transformers_model(model).named_modules():
        if isinstance(experts, SplitExperts):
            for name, place in zip(experts.layout.names, (f"{path}.base_layer", path), strict=True):
                layers = {
                    projection: [f"{path}.{expert}.{projection}" for expert in range(len(experts))]
                    for projection in experts.layout.rows(name, 0)
                }
                yield FusedAdapters(f"{path}.{name}", place, experts.layout, layers)


def _names(layer: str) -> tuple[str, str]:
    """Names of the factors of a layer in peft's files."""
    return f"{PREFIX}{layer}.lora_A.weight", f"{PREFIX}{layer}.lora_B.weight"


def _pop(tensors: dict[str, Tensor], layer: str) -> Factors:
    a, b = (tensors.pop(name) for name in _names(layer))
    return a, b
