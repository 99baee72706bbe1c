import json
from types import SimpleNamespace

import pytest
import torch

from llmqat.formats.contents import contents_of
from llmqat.formats.reader import load_packed
from llmqat.models.loading import load_float
from llmqat.models.patcher import prepare
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import choose_scale, dequantize, quantize
from llmqat.report import details as details_module
from llmqat.report.details import CURVE_POINTS, NAME, WEIGHT_BINS, curves, histogram, layer_histograms, thinned
from llmqat.scheme import QuantScheme
from llmqat.train.loop import TrainResult


@pytest.fixture
def measured_and_models(tiny_llama):
    """A run that measured nothing, its packed layers, and the float model."""
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32))
    return SimpleNamespace(training=None, perplexity={}), contents_of(model).layers, tiny_llama()


@pytest.fixture
def details(finished):
    """Those of a finished LoRA run."""
    return json.loads((finished / NAME).read_text())


def test_a_short_curve_is_whole_and_a_long_one_averaged():
    assert thinned({2: 0.5, 1: 1.0}) == [(1, 1.0), (2, 0.5)]
    assert thinned({}) == []
    long = thinned({step: float(step) for step in range(1, 1001)}, points=10)
    assert long == [(100 * n, 100 * n - 49.5) for n in range(1, 11)]
    assert len(thinned(dict.fromkeys(range(CURVE_POINTS + 1), 1.0))) <= CURVE_POINTS


def test_curves_of_a_run():
    assert curves(None) == {}
    result = TrainResult(4, best_step=2, losses={1: 1.0}, held_out={0: 2.0, 2: 1.0}, flipped={0: 0.0, 2: 0.1})
    assert curves(result) == {
        "loss": [(1, 1.0)],
        "held_out": [(0, 2.0), (2, 1.0)],
        "flipped": [(0, 0.0), (2, 0.1)],
        "best_step": 2,
    }


def test_histogram_counts_every_value():
    values = torch.tensor([-5.0, -0.99, 0.0, 0.99, 7.0])
    counts = histogram(values, 1.0)
    assert len(counts) == WEIGHT_BINS
    assert (counts[0], counts[WEIGHT_BINS // 2], counts[-1], sum(counts)) == (2, 1, 2, 5)


def test_layer_histograms(scheme):
    weight = torch.randn(32, 48)
    s, z = choose_scale(weight, scheme, torch.float32)
    codes = quantize(weight, s, z, scheme)
    w_hat = dequantize(codes, s, z, scheme)
    found = layer_histograms(weight, codes, w_hat, scheme)
    assert found["codes"] == [int((codes == code).sum()) for code in range(scheme.qmin, scheme.qmax + 1)]
    assert sum(found["float"]) == sum(found["grid"]) == weight.numel()
    assert found["limit"] <= float(weight.abs().max())
    without = layer_histograms(None, codes, w_hat, scheme)
    assert without["float"] is None
    assert without["codes"] == found["codes"]


def test_details_of_a_run_are_those_of_the_packed_file(details, finished, model_dir):
    packed, original = load_packed(finished), load_float(str(model_dir), torch.float32)
    layers = {name: module for name, module in packed.named_modules() if isinstance(module, PackedLinear)}
    assert [layer["name"] for layer in details["layers"]] == list(layers)
    for layer in details["layers"]:
        codes, _, _ = layers[layer["name"]].unpack()
        assert layer["codes"] == torch.bincount(codes.flatten().long() + 8, minlength=16).tolist()
        weight = original.get_submodule(layer["name"]).weight.detach()
        assert layer["shape"] == list(weight.shape)
        assert layer["float"] == histogram(weight, min(weight.abs().max(), 4 * weight.std()))
        assert layer["errors"].keys() == {"rtn", "gptq", "qat"}
        assert min(layer["errors"].values()) > 0
    report = json.loads((finished / "report.json").read_text())
    numel = [layer["shape"][0] * layer["shape"][1] for layer in details["layers"]]
    changed = sum(n * layer["codes_changed"] for n, layer in zip(numel, details["layers"], strict=True)) / sum(numel)
    assert changed == pytest.approx(report["training"]["codes_changed"], rel=1e-3)
    assert details["interval"]["against"] in ("rtn", "gptq")
    assert details["interval"]["low"] < details["interval"]["high"]
    assert [step for step, _ in details["curves"]["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in details["curves"]["held_out"]] == [0, 2, 4]


def test_histograms_of_a_part_of_many_layers(measured_and_models, monkeypatch):
    measured, packed, float_model = measured_and_models
    monkeypatch.setattr(details_module, "HISTOGRAMS", 5)
    found = details_module.layers(measured, packed, float_model)
    assert [index for index, layer in enumerate(found) if "codes" in layer] == [0, 3, 6, 9, 12]
    assert all(layer["errors"] == {} and layer["codes_changed"] is None for layer in found)


def test_a_layer_the_float_model_lacks(measured_and_models):
    measured, packed, float_model = measured_and_models
    del float_model.model.layers[0].self_attn.q_proj
    first, second, *_ = details_module.layers(measured, packed, float_model)
    assert first["float"] is None
    assert sum(first["codes"]) == sum(first["grid"]) == 64 * 64
    assert sum(second["float"]) == 32 * 64
