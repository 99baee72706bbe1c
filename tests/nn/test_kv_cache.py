"""Keys and values in int8: the same bits with and without a cache, and in the cache that stores the codes."""

import pytest
import torch
from torch import nn
from transformers import DynamicCache, MistralConfig, MistralForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import convert, prepare
from llmqat.nn.kv_cache import KVQuantizer, kv_bits_of, quantize_kv
from llmqat.nn.quantizers import disable_quantizers
from llmqat.quant.affine import fake_quantize_activation
from llmqat.scheme import QuantScheme
from llmqat.serve.int8_cache import Int8Cache, Int8Layer, serve_int8_kv

IDS = torch.arange(24).view(2, 12) * 5
SCHEME = QuantScheme(4, 16)


def mistral(**options):
    """Two layers whose attention forgets what is more than six tokens back."""
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        sliding_window=6,
        initializer_range=0.15,
        **options,
    )
    return MistralForCausalLM(config).eval()


@pytest.fixture(params=["llama", "sliding"])
def model(request, tiny_llama):
    return tiny_llama() if request.param == "llama" else mistral()


@torch.no_grad()
def logits(model, ids=IDS, **options):
    return model(input_ids=ids, **options).logits


def stepwise(model, cache, ids=IDS, prompt=5):
    """Logits of a prompt and then of one token after the other, through a cache."""
    pieces = []
    for piece in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
        with torch.no_grad():
            output = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits)
    return torch.cat(pieces, 1), cache


def test_what_attention_gets(tiny_llama, monkeypatch):
    """Keys after the rotary embedding, values as projected, per token and head; queries are left alone."""
    model, seen = tiny_llama(), []
    model.set_attn_implementation("sdpa")
    attention = nn.functional.scaled_dot_product_attention

    def spy(query, key, value, **options):
        seen.append((query, key, value))
        return attention(query, key, value, **options)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", spy)
    plain = logits(model, use_cache=False)
    quantize_kv(model, 8)
    changed = logits(model, use_cache=False)
    (q, k, v), (q8, k8, v8) = seen[0], seen[2]
    assert torch.equal(q8, q)
    assert torch.equal(k8, fake_quantize_activation(k))
    assert torch.equal(v8, fake_quantize_activation(v))
    assert not torch.equal(k8, k)
    assert 0 < float((changed - plain).abs().max()) < 0.05 * float(plain.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_cache_gives_the_logits_of_none(model, dtype):
    """No cache, a float cache of quantized values, the int8 cache: one set of numbers, up to the order of summation."""
    model = model.to(dtype)
    unquantized = logits(model, use_cache=False)
    quantize_kv(model, 8)
    expected = logits(model, use_cache=False)
    through_float, _ = stepwise(model, DynamicCache(config=model.config))
    through_int8, cache = stepwise(model, Int8Cache(model.config))
    assert torch.equal(through_int8, through_float), "the same bits in both caches"
    noise = {torch.float32: 1e-5, torch.bfloat16: 4e-2}[dtype] * float(expected.abs().max())
    assert float((through_int8 - expected).abs().max()) < noise
    if dtype == torch.float32:
        assert float((unquantized - expected).abs().max()) > 10 * noise
    assert cache.get_seq_length() == 12


def test_it_stores_codes(tiny_llama):
    model = tiny_llama()
    quantize_kv(model, 8)
    _, cache = stepwise(model, Int8Cache(model.config))
    layer = cache.layers[0]
    assert layer.codes.keys.shape == (2, 2, 12, 16)
    assert layer.codes.keys.dtype == layer.codes.values.dtype == torch.int8
    assert layer.scales.keys.shape == (2, 2, 12, 1)
    assert layer.scales.keys.dtype == torch.float32
    assert cache.nbytes() == 2 * 2 * (2 * 2 * 12) * (16 + 4)


def test_sliding_layers_forget():
    model = mistral()
    quantize_kv(model, 8)
    _, cache = stepwise(model, Int8Cache(model.config))
    assert all(layer.is_sliding for layer in cache.layers)
    assert cache.layers[0].codes.keys.shape[-2] == cache.layers[0].scales.keys.shape[-2] == 5
    assert cache.get_seq_length() == 12
    assert cache.layers[0].get_max_length() == 6


def test_gradients_pass_straight_through(tiny_llama):
    """The backward is that of a model whose keys and values happen to be these: all projections train."""
    model = tiny_llama()
    quantize_kv(model, 8)
    model.train()
    for options in ({"use_cache": False}, {"use_cache": True}):
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, **options).loss.backward()
        for name in ("q_proj", "k_proj", "v_proj"):
            assert float(getattr(model.model.layers[0].self_attn, name).weight.grad.abs().sum()) > 0, name
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)


def test_the_teacher_keeps_float_keys(tiny_llama):
    model = tiny_llama()
    expected = logits(model)
    quantize_kv(model, 8)
    with disable_quantizers(model):
        assert torch.equal(logits(model), expected)
    assert not torch.equal(logits(model), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
def test_generate(model, options):
    quantize_kv(model, 8)
    options = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False, **options}
    torch.manual_seed(1)
    expected = model.generate(IDS, past_key_values=DynamicCache(config=model.config), **options)
    serve_int8_kv(model)
    torch.manual_seed(1)
    output = model.generate(IDS, return_dict_in_generate=True, **options)
    assert isinstance(output.past_key_values, Int8Cache)
    assert torch.equal(output.sequences, expected)
    assert model.generate(IDS, max_new_tokens=2, use_cache=False, do_sample=False, pad_token_id=0).shape == (2, 14)


def test_a_forward_starts_the_int8_cache_only_where_no_gradient_is_wanted(tiny_llama):
    model = tiny_llama()
    quantize_kv(model, 8)
    serve_int8_kv(model)
    with torch.no_grad():
        assert isinstance(model(input_ids=IDS, use_cache=True).past_key_values, Int8Cache)
        assert model(input_ids=IDS, use_cache=False).past_key_values is None
        mine = DynamicCache(config=model.config)
        assert model(input_ids=IDS, past_key_values=mine).past_key_values is mine
    assert not isinstance(model(input_ids=IDS, use_cache=True).past_key_values, Int8Cache)


def test_bookkeeping_reaches_codes_and_scales(tiny_llama):
    """What beam search, assisted generation and batching do to a cache, done to both halves."""
    model = tiny_llama()
    quantize_kv(model, 8)
    expected, _ = stepwise(model, Int8Cache(model.config))
    _, cache = stepwise(model, Int8Cache(model.config))
    cache.crop(-2)
    again, _ = stepwise(model, cache, IDS[:, 10:], prompt=1)
    torch.testing.assert_close(again, expected[:, 10:], rtol=1e-4, atol=1e-4)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3, 1]))
    layer = cache.layers[1]
    assert layer.codes.keys.shape[0] == layer.scales.keys.shape[0] == 3
    assert getattr(cache, "is_croppable", True)  # transformers says so from 5.24 on
    cache.reset()
    assert cache.get_seq_length() == 0
    assert not layer.is_initialized
    restarted, _ = stepwise(model, cache)
    assert torch.equal(restarted, expected)


def test_saved_and_restored(tiny_llama, tmp_path):
    model = tiny_llama()
    prepare(model, SCHEME, kv_bits=8)
    assert kv_bits_of(model) == 8
    directory = save_packed(model, tmp_path / "int8")
    loaded = load_packed(directory)
    assert kv_bits_of(loaded) == 8
    assert len([m for m in loaded.modules() if isinstance(m, KVQuantizer)]) == 2
    torch.testing.assert_close(logits(loaded), logits(model, use_cache=False), rtol=1e-4, atol=1e-4)
    output = loaded.generate(IDS, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, pad_token_id=0)
    assert isinstance(output.past_key_values, Int8Cache)
    converted = convert(model)
    assert torch.equal(logits(converted), logits(loaded))
    plain = tiny_llama()
    prepare(plain, SCHEME)
    loaded = load_packed(save_packed(plain, tmp_path / "float"))
    assert kv_bits_of(loaded) is None
    assert not isinstance(loaded(input_ids=IDS, use_cache=True).past_key_values, Int8Cache)


def test_other_readers_ignore_it(tiny_llama, tmp_path):
    """transformers runs the same directory on a float cache."""
    from transformers import AutoModelForCausalLM

    model = tiny_llama()
    prepare(model, SCHEME, kv_bits=8)
    theirs = AutoModelForCausalLM.from_pretrained(save_packed(model, tmp_path))
    with disable_quantizers(loaded := load_packed(tmp_path)):
        torch.testing.assert_close(logits(theirs), logits(loaded), rtol=1e-4, atol=1e-4)


def test_errors(tiny_llama):
    with pytest.raises(LlmqatError, match="kv_bits must be 8, or left out for a float cache; got 4"):
        quantize_kv(tiny_llama(), 4)
    with pytest.raises(LlmqatError, match="kv_bits is 8, but Linear has no attention with a cache; leave it out"):
        quantize_kv(nn.Linear(2, 2), 8)
    config = tiny_llama().config
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(LlmqatError, match="layer 1 caches in a LinearAttentionLayer: --kv-bits 8 knows full"):
        Int8Cache(config)


def test_the_layer_offers_what_a_cache_layer_must(tiny_llama):
    cache = Int8Cache(tiny_llama().config)
    assert all(isinstance(layer, Int8Layer) for layer in cache.layers)
    assert cache.get_seq_length() == 0
    assert cache.nbytes() == 0
    assert cache.get_mask_sizes(3, 0) == (3, 0)


def test_verify_proves_weights_on_a_float_cache(tiny_llama, tmp_path, monkeypatch):
    """A code of the cache that rounds the other way in float64 says nothing about the file; decoding has a bound of its
    own for that."""
    monkeypatch.setattr("llmqat.formats.verify.continued", lambda *_: [])
    model = tiny_llama()
    prepare(model, SCHEME, kv_bits=8)
    directory = save_packed(model, tmp_path)
    monkeypatch.setattr("llmqat.nn.kv_cache.fake_quant_activation", lambda x: pytest.fail("the cache was quantized"))
    assert verify(directory).ok
