import pytest
import torch

from llmqat.models.patcher import prepare, quantized_layers
from llmqat.scheme import QuantScheme
from llmqat.train.codes import CodeCounts, FirstCodes


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_weight_that_left_the_grid_counts_once(tiny_llama, bits, symmetric):
    model = tiny_llama()
    prepare(model, QuantScheme(bits, 32, symmetric))
    layers = {on_grid.name: on_grid.layer for on_grid in quantized_layers(model)}
    first = FirstCodes(model)
    assert first.packed.keys() == layers.keys()
    before = first.counts
    assert before[::2] == (0, dict.fromkeys(layers, 0))
    assert before == first.compare(model)
    assert (before.clipped == 0) == (not symmetric), "an asymmetric range holds every weight"
    layer = layers["model.layers.0.self_attn.q_proj"]
    middle = layer.codes().int() == (0 if symmetric else 2 ** (bits - 1))
    row, column = middle.nonzero()[0]
    with torch.no_grad():
        layer.weight[row, column] += 1000 * layer.scale[row, column // 32]
    total = sum(layer.weight.numel() for layer in layers.values())
    by_layer = {name: (own is layer) / own.weight.numel() for name, own in layers.items()}
    clipped = pytest.approx(before.clipped + 1 / total)
    assert first.compare(model) == CodeCounts(1 / total, clipped, by_layer)
