"""GPTQ's change of a weight in a byte an entry."""

import torch
from torch import nn

from llmqat.algorithms.compensation import compensation_of
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.affine import choose_scale, grouped
from llmqat.quant.grid import Latent
from llmqat.scheme import QuantScheme


def test_takes_more_bytes_where_one_loses_a_code():
    layer = FakeQuantLinear(nn.Parameter(torch.full((1, 4), 100.0)), None, QuantScheme(8, 4), torch.bfloat16)
    layer.scale.data.fill_(0.25)
    codes = torch.tensor([[1.0, -3.0, 100.0, -77.0]])
    w_hat = layer.stored_scale() * codes
    layer.compensation = compensation_of(layer.weight, w_hat + 0.1, layer.grid)  # steps of 0.94 in int8
    assert layer.compensation.multiples.dtype == torch.int16
    assert torch.equal(layer.codes().float(), codes)


@torch.no_grad()
def test_as_many_weights_lie_near_the_ends_of_their_interval_as_before():
    """They are the first to change their codes in training, whose first steps move weights by less than a step."""
    weight, scheme = torch.randn(256, 512), QuantScheme(4, 64)
    layer = FakeQuantLinear(nn.Parameter(weight), None, scheme, torch.float32)
    layer.set_grid(*choose_scale(weight, scheme, torch.float32))
    latent = weight + 0.5 * layer.scale.abs().mean() * torch.randn_like(weight)
    found = compensation_of(weight, latent, layer.grid)
    assert found.multiples.dtype == torch.int8
    steps = found.step.float().unsqueeze(-1)
    apart = grouped(found.values(torch.float32) - (latent - weight), scheme).abs()
    assert (apart <= 1.51 * steps).all()

    def near(latent, share_of_step):
        codes = grouped(latent, scheme) / layer.scale.unsqueeze(-1)
        to_end = (0.5 - (codes - codes.round()).abs()) * layer.scale.abs().unsqueeze(-1)
        inner = (codes > scheme.qmin - 0.4) & (codes < scheme.qmax + 0.4)
        return int((inner & (to_end < share_of_step * steps)).sum())

    rounded = Latent(weight, found).rows(slice(None))
    for share_of_step in (0.1, 0.25, 0.5):
        assert abs(near(rounded, share_of_step) / near(latent, share_of_step) - 1) < 0.15
