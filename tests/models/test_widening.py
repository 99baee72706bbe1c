import copy

import pytest
import torch
from torch import nn

from llmqat.models.float_view import FloatView, copy_of_float
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.models.widening import compute_in_float32
from llmqat.nn.widened import WidenedEmbedding, WidenedLinear
from llmqat.scheme import QuantScheme
from llmqat.train.modes import select_trainable

IDS = torch.arange(20)[None] + 5
SCHEME = QuantScheme(4, 16)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def rounded(model):
    """`model` with weights that bfloat16 holds."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model.requires_grad_(False)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma3_text", "opt"])
def test_half_the_bytes_and_the_same_numbers(tiny, model_type, tied):
    wide = rounded(tiny(model_type, tie_word_embeddings=tied))
    model = copy.deepcopy(wide)
    for prepared in (wide, model):
        prepare(prepared, SCHEME, storage_dtype=torch.bfloat16)
    compute_in_float32(model, torch.bfloat16)
    with FloatView(model).active(), FloatView(wide).active():
        assert torch.equal(logits(model), logits(wide))
    assert torch.equal(logits(model), logits(wide))
    layers = [on_grid.layer for on_grid in quantized_layers(model)]
    assert {part.dtype for layer in layers for part in (layer.weight, layer.scale)} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.ndim == 1} == {torch.float32}
    assert isinstance(model.get_input_embeddings(), WidenedEmbedding)
    assert isinstance(model.get_output_embeddings(), WidenedLinear)
    assert tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(logits(model), logits(wide))


def test_a_weight_that_would_lose_something_stays_float32(tiny_llama):
    model = rounded(tiny_llama())
    weights = [model.lm_head.weight, model.model.layers[0].mlp.up_proj.weight]
    for weight in weights:
        weight.data[0, 0] = 1 + 2.0**-12  # no bfloat16
    prepare(model, SCHEME, storage_dtype=torch.bfloat16)
    compute_in_float32(model, torch.bfloat16)
    assert [weight.dtype for weight in weights] == [torch.float32] * 2
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16


def test_an_embedding_that_does_more_than_look_up_is_float32(tiny_llama):
    class Other(nn.Embedding):
        pass

    model = tiny_llama(tie_word_embeddings=True)
    model.model.embed_tokens.__class__ = Other
    model.bfloat16().requires_grad_(False)
    prepare(model, SCHEME)
    compute_in_float32(model, torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert quantized_layers(model)[0].layer.weight.dtype == torch.bfloat16
    assert logits(model).dtype == torch.float32


def test_a_tied_head_on_the_grid(tiny_llama):
    """Its embedding looks up rows of the grid, or of the float matrix."""
    wide = rounded(tiny_llama(tie_word_embeddings=True))
    narrow = copy.deepcopy(wide)
    for parameter in narrow.parameters():
        parameter.data = parameter.data.bfloat16()
    for model in (wide, narrow):
        prepare(model, SCHEME, storage_dtype=torch.bfloat16, lm_head_bits=4)
    compute_in_float32(narrow, torch.bfloat16)
    assert torch.equal(logits(narrow), logits(wide))
    with FloatView(narrow).active(), FloatView(wide).active():
        assert torch.equal(logits(narrow), logits(wide))
    assert narrow.lm_head.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_copy_of_the_float_model_stays_while_weights_train(tiny_llama, dtype):
    """It shares weights that become float32 when they train, and no others."""
    model = rounded(tiny_llama())
    expected = logits(model)
    prepare(model, SCHEME, storage_dtype=dtype)
    compute_in_float32(model, dtype)
    copied, weight = copy_of_float(model), model.lm_head.weight
    assert (copied.model.lm_head.weight.data_ptr() == weight.data_ptr()) == (dtype == torch.bfloat16)
    select_trainable(model, "full")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    with copied.active() as float_model:
        assert torch.equal(logits(float_model), expected)
