import gc

import pytest
import torch
from torch import nn

from llmqat.nn import fake_quant_function
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.quant.input_cast import InputCast
from llmqat.scheme import QuantScheme


def test_one_cast_of_one_tensor():
    cast, x = InputCast(), torch.randn(3, 4, requires_grad=True)
    first = cast(x, torch.bfloat16)
    assert torch.equal(first, x.bfloat16())
    assert not first.requires_grad
    assert cast(x, torch.bfloat16) is first
    assert cast(x, torch.float16).dtype == torch.float16
    assert cast(x.detach(), torch.bfloat16) is not first
    assert cast(x, torch.float32).data_ptr() == x.data_ptr()
    with torch.inference_mode():
        y = torch.ones(2)
        assert torch.equal(cast(y, torch.bfloat16), y.bfloat16())


def test_a_tensor_that_was_written_to_is_cast_again():
    cast, x = InputCast(), torch.zeros(4)
    cast(x, torch.bfloat16)
    x += 1
    assert torch.equal(cast(x, torch.bfloat16), torch.ones(4).bfloat16())


def test_a_cast_goes_with_its_input():
    cast, x = InputCast(), torch.zeros(4)
    cast(x, torch.bfloat16)
    assert cast.kept is not None
    del x
    gc.collect()
    assert cast.kept is None


@pytest.mark.parametrize("act_bits", [None, 8])
def test_layers_that_share_an_input_share_what_they_save_of_it(monkeypatch, act_bits):
    """The same outputs and gradients, to the bit, as of layers that cast it each on its own."""
    scheme = QuantScheme(4, 16, act_bits=act_bits)
    layers = [FakeQuantLinear.from_linear(nn.Linear(32, 8), scheme, torch.bfloat16) for _ in range(3)]

    def run():
        x, saved = torch.randn(5, 32, generator=torch.Generator().manual_seed(0), requires_grad=True), []
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            y = torch.cat([layer(x) for layer in layers])
        y.float().square().sum().backward()
        inputs = {t.data_ptr() for t in saved if t.shape == x.shape and t.dtype == torch.bfloat16}
        gradients = [parameter.grad for layer in layers for parameter in layer.parameters()]
        for layer in layers:
            layer.zero_grad()
        return len(inputs), [y, x.grad, *gradients]

    shared = run()
    monkeypatch.setattr(fake_quant_function, "_input_cast", lambda x, dtype: x.detach().to(dtype))
    apart = run()
    assert (shared[0], apart[0]) == (1, 3)
    assert all(torch.equal(a, b) for a, b in zip(shared[1], apart[1], strict=True))
