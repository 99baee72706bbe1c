"""A layer whose rows two processes divide computes, to the bit, what it computes whole."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from llmqat.nn.dtensor import divided, local_shard
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.grid import Adapters, Latent
from llmqat.quant.row_shards import RowShard
from llmqat.scheme import QuantScheme
from tests.quant.helpers import random_change
from tests.two_processes import run_in_two

IN, OUT = 64, 25  # rows that two processes cannot divide evenly
VARIANTS = [
    {"symmetric": False},
    {"lora": True, "compensation": True, "stored": torch.bfloat16},
    {"lora": True, "clip_mask": True, "symmetric": False},
    {"code_scale": True, "compensation": True, "bits": 3},
]


def make(symmetric=True, lora=False, compensation=False, code_scale=False, clip_mask=False, bits=4, stored=None):
    """A layer, and its adapters, alike in every process."""
    torch.manual_seed(1)
    layer = FakeQuantLinear.from_linear(nn.Linear(IN, OUT), QuantScheme(bits, 16, symmetric), torch.bfloat16, clip_mask)
    with torch.no_grad():
        layer.scale *= 0.7  # weights beyond the ends of the grid, for the mask
        if compensation:
            layer.compensation = random_change(OUT, IN, 16, 0.05)
        if code_scale:
            layer.decouple_scale()
            layer.scale *= 1.1
    if stored is not None:
        layer.weight.requires_grad_(False).data = layer.weight.to(stored)
        layer.scale.requires_grad_(False)
    if layer.zero_point is not None:
        layer.zero_point.requires_grad_(True)
    adapters = Adapters(nn.Parameter(torch.randn(3, IN) * 0.1), nn.Parameter(torch.randn(OUT, 3)), 0.03)
    return layer, adapters if lora else None


def gradients(layer, adapters, x):
    """Output, gradient of the input, and those of what trains, by name."""
    x = x.clone().requires_grad_()
    y = layer(x, adapters)
    (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    trained = dict(layer.named_parameters()) | ({} if adapters is None else {"a": adapters.a, "b": adapters.b})
    return y, x.grad, {name: p.grad for name, p in trained.items() if p.requires_grad}


def tensors_of(layer):
    """All that a layer holds, but for its bias."""
    return [tensor for name, tensor in layer.state_dict().items() if name != "bias"]


def compare(rank, options, dtype):
    whole, adapters = make(**options)
    layer, same = copy.deepcopy(whole), copy.deepcopy(adapters)
    mesh = init_device_mesh("cpu", (2,))
    for name, parameter in layer.row_tensors.items():
        setattr(layer, name, divided(parameter, mesh))
    assert len(local_shard(layer.weight)) == [13, 12][rank]
    both = zip(tensors_of(layer), tensors_of(whole), strict=True)
    assert all(local_shard(own).nbytes * OUT == all_rows.nbytes * [13, 12][rank] for own, all_rows in both)
    x = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(rank)).to(dtype)  # each its own tokens
    y, dx, ours = gradients(layer, same, x)
    expected, expected_dx, theirs = gradients(whole, adapters, x)
    assert torch.equal(y, expected)
    assert torch.equal(dx, expected_dx)
    assert ours.keys() == theirs.keys() != set()
    for name, gradient in theirs.items():
        torch.distributed.all_reduce(gradient)
        found = ours[name]
        if name in ("a", "b"):  # FSDP2 takes the mean of these
            torch.distributed.all_reduce(found)
            found = found / 2
        rows = layer.shard.rows if name in layer.row_tensors else slice(None)
        torch.testing.assert_close(local_shard(found), (gradient / 2)[rows], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        layer.enabled = whole.enabled = False
        assert torch.equal(layer(x), whole(x))


def member(rank):
    for options in VARIANTS:
        for dtype in (torch.float32, torch.bfloat16):
            compare(rank, options, dtype)


def test_two_processes_compute_what_one_does(tmp_path):
    run_in_two(member, tmp_path)


@pytest.mark.parametrize(("total", "count"), [(25, 2), (8, 4), (5, 4), (1, 3)])
def test_every_row_is_in_one_shard(total, count):
    shards = [RowShard(None, index, count, total).rows for index in range(count)]
    assert [row for rows in shards for row in range(rows.start, rows.stop)] == list(range(total))


def test_a_shard_has_the_latents_of_the_whole():
    layer, adapters = make(lora=True)
    whole = layer.latent(adapters).rows(slice(None))
    for index in (0, 1):
        shard = RowShard(None, index, 2, OUT)
        own = Latent(layer.weight[shard.rows], None, adapters, shard)
        assert torch.equal(own.rows(slice(None)), whole[shard.rows])
