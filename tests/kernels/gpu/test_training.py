"""A training step whose weights go through Triton's kernels, as on a GPU: the loss and the gradients of torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import llmqat
from llmqat.kernels.gpu import available, grid_rows
from llmqat.nn.fake_quant_function import fake_quant_linear
from llmqat.quant.affine import choose_scale
from llmqat.quant.grid import Adapters, Grid, Latent
from llmqat.scheme import QuantScheme

KERNELS = ("find", "grid_gradients")


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels that ran, in order, where CPU tensors are taken for those of a GPU."""
    ran = []
    monkeypatch.setattr(available, "runs_on", lambda device: True)
    for name in KERNELS:
        monkeypatch.setattr(grid_rows, name, noted(ran, name, getattr(grid_rows, name)))
    return ran


def noted(ran, name, launch):
    def note(*args, **options):
        ran.append(name)
        return launch(*args, **options)

    return note


class Aten(TorchDispatchMode):
    """Operations of torch that write a tensor, in order."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            self.ran.append(str(func))
        return result


def layer(scheme, rank=0):
    weight = torch.randn(24, 64).mul_(0.1).requires_grad_(rank == 0)
    scale, zero_point = choose_scale(weight.detach(), scheme, torch.bfloat16)
    scale = scale.float().requires_grad_()
    adapters = None
    if rank:
        a, b = torch.randint(-8, 9, (rank, 64)) / 64, torch.randint(-8, 9, (24, rank)) / 64
        adapters = Adapters(a.requires_grad_(), b.requires_grad_(), 0.5)
    return Latent(weight, None, adapters), Grid(scale, zero_point, None, scheme, torch.bfloat16)


def step(latent, grid, x):
    """Output of a layer, and the gradients of all that trains."""
    leaves = [t for t in (latent.weight, *(latent.adapters or ())[:2], grid.scale) if t.requires_grad]
    y = fake_quant_linear(x, latent, grid)
    return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_layer_has_the_output_and_gradients_of_torch(rank, symmetric, request):
    latent, grid = layer(QuantScheme(4, 32, symmetric), rank)
    x = torch.randn(5, 64)
    expected = step(latent, grid, x)
    ran = request.getfixturevalue("launches")
    for found, right in zip(step(latent, grid, x), expected, strict=True):
        torch.testing.assert_close(found, right)
    assert ran == ["find", "grid_gradients"]


def test_a_layer_costs_few_launches(launches, monkeypatch):
    for name in KERNELS:  # the interpreter is made of operations of torch itself
        monkeypatch.setattr(grid_rows, name, noted(launches, name, lambda *args, **options: None))
    latent, grid = layer(QuantScheme(4, 32), rank=4)
    x = torch.randn(5, 64, requires_grad=True)
    with Aten() as aten:
        fake_quant_linear(x, latent, grid)
    assert (launches, aten.ran) == (["find"], ["aten.mm.default"])
    grid.scale.requires_grad_(False)
    launches.clear()
    with Aten() as aten:
        torch.autograd.grad(fake_quant_linear(x, latent, grid).sum(), [x, *latent.adapters[:2]])
    assert launches == ["find", "find"]
    products = [name for name in aten.ran if "mm" in name]
    assert len(products) == 6  # the output, its input's gradient, and two for each factor from the thin side
    assert len(aten.ran) - len(products) <= 6  # a sum and its gradient to begin with; both factors scaled


def losses(model):
    """Of three steps on the same tokens."""
    ids, found = torch.arange(32).view(2, 16), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found)


def test_a_model_trains_as_by_torch_and_ships_the_codes_of_its_forward(tiny_llama, request):
    model, by_torch = tiny_llama(num_hidden_layers=1), tiny_llama(num_hidden_layers=1)
    for each in (model, by_torch):
        llmqat.prepare(each, QuantScheme(4, 32), init="rtn")
    expected = losses(by_torch)
    launches = request.getfixturevalue("launches")
    torch.testing.assert_close(losses(model), expected)
    assert set(launches) == set(KERNELS)
    layer = model.model.layers[0].mlp.up_proj
    assert torch.equal(layer.quantized_weight(), layer.grid.stored().dequantize(layer.codes().float()))
