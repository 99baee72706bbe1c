import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llmqat.config import OBSERVERS
from llmqat.errors import LlmqatError
from llmqat.kernels.activations import static_activation
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.packed_linear import PackedLinear
from llmqat.quant.affine import fake_quantize_static
from llmqat.scheme import QuantScheme

STATIC = QuantScheme(8, 16, act_bits=8, act_static=True)


@pytest.fixture
def layer():
    layer = FakeQuantLinear.from_linear(nn.Linear(32, 8), STATIC, torch.bfloat16).train()
    layer.set_observer("minmax")
    return layer


def scale_of(magnitude):
    return torch.tensor([magnitude / 127]).bfloat16()


def test_the_range_follows_the_inputs_until_it_is_frozen(layer):
    x = torch.randn(4, 32).clamp(-2, 2)
    x[0, 0] = -3.0
    layer(x)
    assert torch.equal(layer.stored_act_scale(), scale_of(3.0))
    layer(x / 2)
    layer.eval()(2 * x)
    layer.train().observing = False
    layer(2 * x)
    assert torch.equal(layer.stored_act_scale(), scale_of(3.0)), "smaller, in evaluation, and frozen: it stays"
    layer.observing = True
    layer(2 * x)
    assert torch.equal(layer.stored_act_scale(), scale_of(6.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OBSERVERS)
def test_what_is_packed_is_what_was_trained(kind, dtype):
    layer = FakeQuantLinear.from_linear(nn.Linear(32, 8), STATIC, torch.bfloat16).train()
    layer.bias.data = layer.bias.data.bfloat16().float()  # as it is stored
    layer.set_observer(kind)
    layer(torch.randn(50, 32))
    layer.eval()
    packed = PackedLinear.from_fake_quant(layer, layer.codes())
    x = 2 * torch.randn(5, 32, dtype=dtype)
    assert packed.input_scale.shape == (1,)
    assert torch.equal(packed.input_scale, layer.stored_act_scale())
    torch.testing.assert_close(packed(x), layer(x))  # a kernel may sum in another order
    x_hat = fake_quantize_static(x, packed.input_scale)
    assert not torch.equal(x_hat, x)
    assert len((x_hat.float() / packed.input_scale.float()).round().unique()) <= 256
    assert torch.equal(layer(x), nn.functional.linear(x_hat, layer.quantized_weight().to(dtype), layer.bias.to(dtype)))


def test_gradients_stop_where_the_grid_ends():
    x, scale = torch.tensor([-200.0, -128.4, -1.0, 0.3, 127.4, 127.6], requires_grad=True), torch.ones(1)
    y = static_activation(x, scale)
    assert y.tolist() == [-128, -128, -1, 0, 127, 127]
    y.sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 0]


def test_gradient_checkpointing_observes_once(layer):
    layer.set_observer("moving_average")
    x = torch.randn(4, 32, requires_grad=True)
    layer(3 * x)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    expected = 0.99 * 3 * x.abs().max() + 0.01 * x.abs().max()
    torch.testing.assert_close(layer.act_state, expected.detach().double().view(1))


def test_a_float_layer_observes_but_does_not_round(layer):
    x = torch.randn(4, 32)
    layer.enabled = False
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
    assert torch.equal(layer.stored_act_scale(), scale_of(x.abs().max()))


def test_state_travels(layer):
    layer(torch.randn(4, 32))
    other = FakeQuantLinear.from_linear(nn.Linear(32, 8), STATIC, torch.bfloat16)
    other.set_observer("minmax")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.stored_act_scale(), layer.stored_act_scale())
    assert torch.equal(other.act_state, layer.act_state)
    assert layer.to(torch.bfloat16).act_scale.dtype == torch.float32


def test_a_state_without_a_range_is_refused_by_a_layer_that_had_one(layer):
    empty = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer(torch.randn(4, 32))
    layer.load_state_dict(empty)
    with pytest.raises(LlmqatError, match="have no range yet"):
        layer.eval()(torch.randn(4, 32))


def test_without_a_range_nothing_runs(layer):
    for use in (lambda: layer.eval()(torch.randn(4, 32)), lambda: PackedLinear.from_fake_quant(layer, layer.codes())):
        with pytest.raises(LlmqatError, match=r"have no range yet; call llmqat\.observe_activations\(model, batches\)"):
            use()


def test_a_range_is_looked_for_once(layer, monkeypatch):
    """Each look waits for the device."""
    looks, look = [], torch.Tensor.all
    monkeypatch.setattr(torch.Tensor, "all", lambda self: looks.append(self is layer.act_scale) or look(self))
    for _ in range(3):
        layer(torch.randn(4, 32))
    assert sum(looks) == 1
    layer.set_observer("minmax")
    with pytest.raises(LlmqatError, match="have no range yet"):
        layer.stored_act_scale()


def test_dynamic_layers_have_no_state():
    layer = FakeQuantLinear.from_linear(nn.Linear(32, 8), QuantScheme(8, 16, act_bits=8), torch.bfloat16)
    assert not layer.observing
    assert set(layer.state_dict()) == {"weight", "bias", "scale"}
    assert "input_scale" not in PackedLinear.from_fake_quant(layer, layer.codes()).state_dict()
