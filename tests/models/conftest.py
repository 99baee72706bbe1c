"""What preparing, training, packing and loading a tiny model of each family gives."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from llmqat.formats.dense import dense_copy
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare, quantized_layers, transformers_model
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora, select_trainable

# Initial codes and train mode of a cell of the support table that goes on to the file.
CELLS = (("rtn", "full"), ("gptq", "lora"))
# Codes per step of adapters, a fraction of the weights' size otherwise: a single step has to show.
ADAPTER_RATE, RATE = 1.0, 0.02


@dataclass(frozen=True)
class Outcome:
    """What held for one cell of the support table.

    Attributes:
        layers: layers quantized.
        errors: relative output errors of round-to-nearest and of GPTQ, by layer, where it ran.
        trained: the loss was finite, and the step moved every layer.
        equal: codes and scales of the file are those of training.
        transformers: transformers loads it, with equal weights and logits within the bound.
        within_bound: the logits of the packed layers lie within the bound.
    """

    layers: int
    errors: dict[str, tuple[float, float]]
    trained: bool
    equal: bool
    transformers: bool
    within_bound: bool


def step(model: nn.Module, mode: str, ids: Tensor) -> bool:
    """One training step by a loop of one's own; whether the loss was finite and every layer on a grid has moved."""
    select_trainable(model, mode)
    trains = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trains.items()}
    logits = model(input_ids=ids).logits
    causal = logits.ndim == 3
    targets = ids[:, 1:].flatten() if causal else torch.arange(len(ids)) % logits.shape[-1]
    loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1) if causal else logits, targets)
    loss.backward()
    rates = {name: ADAPTER_RATE if "lora_" in name else RATE for name in trains}
    torch.optim.SGD({"params": [p], "lr": rates[name]} for name, p in trains.items()).step()
    moved = [name for name, p in trains.items() if not torch.equal(p, before[name])]
    layers = [name for name, _, _ in quantized_layers(model)]
    return bool(loss.isfinite()) and all(any(f"{layer}." in name for name in moved) for layer in layers)


@torch.no_grad()
def transformers_agrees(model: nn.Module, directory: Path, head: Any) -> bool:
    """Whether transformers alone loads the same weights, and its logits err by at most twice what plain torch does."""
    packed = load_packed(directory)
    theirs, info = head.from_pretrained(directory, output_loading_info=True)
    ids = torch.arange(32).view(1, -1)
    logits = theirs(input_ids=ids).logits  # decompresses at the first forward
    same = [not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))]
    layers = {name: m for name, m in packed.named_modules() if isinstance(m, PackedLinear)}
    for name, layer in layers.items():
        linear = theirs.get_submodule(name)
        weight = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
        same.append(torch.equal(weight, dequantize(*layer.unpack(), layer.scheme)))
    for name, parameter in transformers_model(model).named_parameters():
        own, _, leaf = name.rpartition(".")
        if own not in layers or leaf == "bias":
            adapter = own.startswith(tuple(layers)) and own not in layers
            same.append(adapter or torch.equal(theirs.get_parameter(name), parameter.to(theirs.dtype)))
    if theirs.dtype == torch.float32:
        plain, exact = (dense_copy(packed, dtype)(input_ids=ids).logits for dtype in (torch.float32, torch.float64))
        same.append(bool((logits - exact).abs().max() <= 2 * (plain - exact).abs().max()))
    return all(same)


def sequences() -> Tensor:
    """Four batches of token ids ``(2, 24)``."""
    return torch.randint(0, 128, (4, 2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def outcome(families, tiny, tmp_path_factory) -> Callable[[str, str, str], Outcome]:
    """``outcome(model_type, init, mode)``: prepare, train for a step, pack, load; computed once in a session."""

    @cache
    def make(model_type: str, init: str, mode: str) -> Outcome:
        model = tiny(model_type)
        ids = sequences()
        dtype = torch.bfloat16 if init == "rtn" else torch.float32
        report = prepare(model, QuantScheme(4, 16), init=init, calibration=list(ids), storage_dtype=dtype)
        prepared = add_lora(model, 4) if mode == "lora" else model
        trained = step(prepared, mode, ids[0])
        directory = save_packed(prepared.eval(), tmp_path_factory.mktemp(model_type))
        check = verify(directory, against=prepared)
        agrees = transformers_agrees(prepared, directory, families[model_type].head)
        equal = check.codes_equal and check.scales_equal
        return Outcome(len(report.quantized), report.errors, trained, equal, agrees, check.ok)

    return make


@pytest.fixture(scope="session")
def scales_train(tiny) -> Callable[[str], bool]:
    """``scales_train(model_type)``: whether a step that trains scales alone moves every layer; once in a session."""

    @cache
    def make(model_type: str) -> bool:
        model = tiny(model_type)
        prepare(model, QuantScheme(4, 16))
        return step(model, "scales", sequences()[0])

    return make


@pytest.fixture(scope="session")
def support_table(families, outcome, scales_train) -> Callable[[], str]:
    """The table in the README, from what `outcome` gave for every cell."""

    def render() -> str:
        rows = [
            "| | GPTQ | full | LoRA | scales | packed = trained | transformers | packed op |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for model_type, family in families.items():
            cells = {cell: outcome(model_type, *cell) for cell in CELLS}
            calibrated = all(gptq < rtn for cell in cells.values() for rtn, gptq in cell.errors.values())
            modes = [*(o.trained for o in cells.values()), scales_train(model_type)]
            held = [all(getattr(o, name) for o in cells.values()) for name in ("equal", "transformers", "within_bound")]
            marks = " | ".join("yes" if mark else "no" for mark in [calibrated, *modes, *held])
            rows.append(f"| {family.name} | {marks} |")
        return "\n".join(rows) + "\n"

    return render
