"""Where the weights behind the codes lie when training begins."""

import pytest
import torch
from torch import nn

import llmqat
from llmqat import QuantScheme
from llmqat.mapped import Disk, is_mapped
from llmqat.models.patcher import quantized_layers
from llmqat.train.first_latents import MARGIN, keep_from_ends

SCHEME = QuantScheme(4, 32)


@torch.no_grad()
def offsets(on_grid):
    """How far latents lie from the middle of their codes, in codes, where the grid goes on behind both ends."""
    layer, codes = on_grid.layer, on_grid.codes().float()
    latent = layer.latent(on_grid.adapters).rows(slice(None))
    scale = layer.grid.scale_of_codes.repeat_interleave(SCHEME.group_size, -1)
    inner = (codes > SCHEME.qmin) & (codes < SCHEME.qmax)
    return (latent / scale - codes).abs()[inner]


def codes_in(model):
    return {on_grid.name: on_grid.codes() for on_grid in quantized_layers(model)}


def same_codes(model, codes):
    return all(torch.equal(on_grid.codes(), codes[on_grid.name]) for on_grid in quantized_layers(model))


def adapted(model):
    """With LoRA whose adapters are not zero."""
    model = llmqat.add_lora(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


@pytest.mark.parametrize(
    ("init", "keep_float", "lora"),
    [("rtn", False, False), ("gptq", False, False), ("gptq", True, False), ("gptq", False, True), ("gptq", True, True)],
)
@pytest.mark.parametrize("in_files", [False, True])
def test_keeps_the_margin_and_every_code(tiny_llama, tokens, tmp_path, init, keep_float, lora, in_files):
    model = tiny_llama()
    llmqat.prepare(model, SCHEME, init=init, calibration=tokens, keep_float=keep_float)
    model = adapted(model) if lora else model
    weights = [on_grid.layer.weight.clone() for on_grid in quantized_layers(model)]
    codes, disk = codes_in(model), Disk(tmp_path) if in_files else None
    near = [float(offsets(on_grid).max()) for on_grid in quantized_layers(model)]
    assert max(near) > 0.49
    keep_from_ends(model, 0.1, disk)
    assert same_codes(model, codes)
    for on_grid in quantized_layers(model):
        change = on_grid.layer.compensation  # a multiple of a step
        slack = 1e-5 if change is None or not lora else 1.5 * float((change.step / on_grid.layer.scale).max())
        assert slack < 0.05
        assert float(offsets(on_grid).max()) < 0.4 + slack
    for on_grid, weight in zip(quantized_layers(model), weights, strict=True):
        assert torch.equal(on_grid.layer.weight, weight) == (keep_float and lora)
        if keep_float and lora:
            assert is_mapped(on_grid.layer.compensation.multiples) == in_files


def test_float_weights_and_a_grid_that_is_off_stay(tiny_llama, tokens):
    """Below adapters, weights rounded to nearest are those of the float model; a control trains without the grid."""
    rounded = tiny_llama()
    llmqat.prepare(rounded, SCHEME)
    off = tiny_llama()
    llmqat.prepare(off, SCHEME, init="gptq", calibration=tokens)
    for on_grid in quantized_layers(off):
        on_grid.layer.enabled = False
    for model in (llmqat.add_lora(rounded, r=4), off):
        before = [on_grid.layer.weight.clone() for on_grid in quantized_layers(model)]
        keep_from_ends(model, 0.1)
        after = [on_grid.layer.weight for on_grid in quantized_layers(model)]
        assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.parametrize("loss", ["kd", "ce"])
def test_margin_of_the_loss(tiny_llama, tokens, loss):
    """Distillation begins with the margin, cross-entropy without."""
    model = tiny_llama()
    teacher = llmqat.FloatCopy(tiny_llama()) if loss == "kd" else None
    llmqat.prepare(model, SCHEME)
    ends = max(float(offsets(on_grid).max()) for on_grid in quantized_layers(model))
    rows = torch.cat(tokens)
    llmqat.finetune(model, rows, rows[:2], teacher=teacher, max_steps=1, batch_size=1, lr=0.0, lr_float=0.0)
    left = max(float(offsets(on_grid).max()) for on_grid in quantized_layers(model))
    assert left == pytest.approx(0.5 - MARGIN[loss] if loss == "kd" else ends, abs=1e-4)
