import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from llmqat.nn.widened import WidenedEmbedding, WidenedLinear

IDS = torch.tensor([[3, 0, 7], [7, 1, 2]])


@pytest.mark.parametrize("make", [nn.Embedding, lambda *size: Gemma3TextScaledWordEmbedding(*size, 0, 5.1)])
def test_rows_are_those_of_a_float32_matrix(make):
    """Also where they are multiplied: by a factor, and to a product, that bfloat16 would round."""
    module = make(8, 16)
    module.weight.data = module.weight.data.bfloat16().float()
    expected = module(IDS)
    module.weight.data = module.weight.data.bfloat16()
    widened = WidenedEmbedding.from_embedding(module.eval())
    assert widened.weight is module.weight
    assert not widened.training
    assert widened(IDS).dtype == torch.float32
    assert torch.equal(widened(IDS), expected)
    assert list(widened.state_dict()) == ["weight"]


@pytest.mark.parametrize("bias", [True, False])
def test_a_head_computes_in_the_dtype_of_its_input_or_of_autocast(bias):
    module, x = nn.Linear(16, 8, bias=bias).bfloat16(), torch.randn(3, 16)
    widened = WidenedLinear.from_linear(module)
    assert widened.weight is module.weight
    assert widened.bias is module.bias
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(widened(x), module(x))
    assert torch.equal(widened(x), module.float()(x))
