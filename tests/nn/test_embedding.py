"""A tied embedding and its quantized head are one matrix: looked up, trained, adapted and packed as one."""

import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from llmqat.errors import LlmqatError
from llmqat.models.patcher import convert, prepare
from llmqat.nn.embedding import FakeQuantEmbedding, PackedEmbedding
from llmqat.nn.lora import LoraFakeQuantLinear
from llmqat.quant.affine import quantize
from llmqat.quant.grid import row_chunks
from llmqat.scheme import QuantScheme
from llmqat.train.modes import add_lora, select_trainable

IDS = torch.tensor([[0, 5, 127], [5, 5, 64]])


@pytest.fixture
def tied(tiny_llama):
    """``tied(bits, symmetric, **options)``: a tied model prepared with a quantized head."""

    def make(bits=8, symmetric=True, **options):
        model = tiny_llama(tie_word_embeddings=True)
        prepare(model, QuantScheme(4, 16, symmetric), lm_head_bits=bits, **options)
        return model

    return make


def w_hat(head, *adapters):
    """The matrix a head multiplies by, seen from outside."""
    with torch.no_grad():
        return head(torch.eye(head.in_features), *adapters).T


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_looks_up_rows_of_the_head(tied, bits, symmetric):
    """3 bits come by an override only, and cross the words of a zero point."""
    overrides = {"lm_head": {"bits": bits}}
    model = tied(8, symmetric, storage_dtype=torch.bfloat16, overrides=overrides)
    embedding, head = model.model.embed_tokens, model.lm_head
    assert isinstance(embedding, FakeQuantEmbedding)
    assert embedding.weight is head.weight
    assert head.scheme == QuantScheme(bits, 16, symmetric)
    expected = w_hat(head)[IDS]
    assert torch.equal(embedding(IDS), expected)
    assert embedding(IDS).dtype == torch.float32
    packed = convert(model)
    assert isinstance(packed.model.embed_tokens, PackedEmbedding)
    assert torch.equal(packed.model.embed_tokens(IDS), expected)
    assert packed.model.embed_tokens(IDS[:, :0]).shape == (2, 0, 64)


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("clip_mask", [False, True])
def test_gradients_are_those_of_a_one_hot_linear(tied, symmetric, decoupled, clip_mask):
    """A lookup is a product with one-hot rows, so the head's own backward, which has its own test, is the reference."""
    model = tied(4, symmetric, clip_mask=clip_mask)
    embedding, head = model.model.embed_tokens, model.lm_head
    with torch.no_grad():
        head.scale.mul_(0.7)  # some weights lie beyond the ends
    if decoupled:
        head.decouple_scale()
        with torch.no_grad():
            head.scale.mul_(1.1)
    wanted = [p for p in (head.weight, head.scale) if p is not None]
    g = torch.randn(*IDS.shape, 64)
    got = torch.autograd.grad((embedding(IDS) * g).sum(), wanted)
    # y = x @ W_hat.T over all 64 unit inputs is W_hat.T; its rows at IDS are weighed by g.
    through_head = head(torch.eye(64)).T[IDS]
    expected = torch.autograd.grad((through_head * g).sum(), wanted)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_adapters_reach_the_lookup(tied):
    """Codes with adapters are the head's, bit for bit; gradients of both factors are those through the head."""
    model = tied(4)
    peft_model = add_lora(model, 4)
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, LoraFakeQuantLinear)
    a, b = head.factors("default")
    nn.init.normal_(b)
    assert torch.equal(embedding(IDS), w_hat(head.base_layer, head.adapters())[IDS])
    g = torch.randn(*IDS.shape, 64)
    got = torch.autograd.grad((embedding(IDS) * g).sum(), (a, b))
    expected = torch.autograd.grad((head(torch.eye(64)).T[IDS] * g).sum(), (a, b))
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with peft_model.disable_adapter():
        assert torch.equal(embedding(IDS), w_hat(head.base_layer)[IDS])
    before = embedding(IDS)
    merged = peft_model.merge_and_unload()
    assert torch.equal(merged.model.embed_tokens(IDS), before)


def test_adapted_rows_come_from_the_chunks_of_the_whole(monkeypatch, tied):
    """Several chunks, wanted rows in some of them only."""
    monkeypatch.setattr("llmqat.quant.grid.CHUNK_ELEMENTS", 64 * 50)
    assert len(list(row_chunks(128, 64))) == 3
    model = tied(4)
    add_lora(model, 4)
    nn.init.normal_(model.lm_head.factors("default")[1])
    head = model.lm_head
    codes = head.base_layer.codes(head.adapters())
    rows = model.model.embed_tokens(IDS)
    layer = head.base_layer
    scale = layer.stored_scale()[IDS.flatten()]
    assert torch.equal(quantize(rows.flatten(0, 1), scale, None, layer.scheme), codes[IDS.flatten()])


def test_both_uses_train_the_one_weight(tied):
    model = tied()
    select_trainable(model, "full")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = [name for name in trained if "embed" in name or "head" in name]
    assert names == ["model.embed_tokens.weight", "lm_head.scale"]
    grads = []
    for use in ("both", "lookup"):
        model.zero_grad()
        hidden = model.model(input_ids=IDS).last_hidden_state
        (hidden if use == "lookup" else model.lm_head(hidden)).square().sum().backward()
        grads.append(model.lm_head.weight.grad.clone())
    assert (grads[1] != 0).any(1).nonzero().flatten().tolist() == [0, 5, 64, 127]
    assert (grads[0] != 0).any(1).all()


def test_casts_leave_the_master_and_change_what_is_looked_up(tied):
    model = tied().to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight is model.lm_head.weight
    assert model.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert model(input_ids=IDS).logits.dtype == torch.bfloat16
    packed = convert(model)
    assert packed.model.embed_tokens(IDS).dtype == torch.bfloat16
    assert packed.float().model.embed_tokens(IDS).dtype == torch.float32


def gemma(**options):
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
        max_position_embeddings=64,
        **options,
    )
    return Gemma3ForCausalLM(config).eval()


def test_scaled_embeddings_keep_their_scale():
    """Gemma multiplies embeddings by sqrt(hidden); losing that would be silent."""
    model = gemma()
    float_rows = model.model.embed_tokens(IDS)
    prepare(model, QuantScheme(8, 16), lm_head_bits=8)
    assert torch.equal(model.model.embed_tokens(IDS), w_hat(model.lm_head)[IDS] * 8)
    torch.testing.assert_close(model.model.embed_tokens(IDS), float_rows, rtol=0, atol=0.02)
    expected = model.model.embed_tokens(IDS)
    assert torch.equal(convert(model).model.embed_tokens(IDS), expected)


def test_an_unknown_embedding_is_refused(tiny_llama):
    class Shifted(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    model = tiny_llama(tie_word_embeddings=True)
    weight = model.lm_head.weight
    model.model.embed_tokens = Shifted(128, 64)
    model.model.embed_tokens.weight = weight
    with pytest.raises(LlmqatError, match=r"tied to a Shifted, which llmqat cannot .* leave --lm-head-bits out"):
        prepare(model, QuantScheme(4, 16), lm_head_bits=8)
    assert isinstance(model.lm_head, nn.Linear), "a refusal changes nothing"
