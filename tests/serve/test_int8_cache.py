"""`--kv-bits 8` on the native decoder: codes of the trained grid, tokens of transformers, a cache both can read."""

import pytest
import torch
from transformers import DynamicCache

import llmqat
from llmqat.nn.quantizers import disable_quantizers
from llmqat.quant.affine import quantize_activation
from llmqat.scheme import QuantScheme
from llmqat.serve.families import FAMILIES
from llmqat.serve.forward import accelerate_forward
from llmqat.serve.generate import accelerate_generate
from llmqat.serve.int8_cache import Int8Cache
from tests.serve.helpers import OPTIONS, PROMPT, errors, generate, packed_model

IDS = torch.arange(75)[None] * 7 % 128


def int8_model(family="llama", **options):
    return packed_model(family, kv_bits=8, **options)


def filled(model, ids=IDS):
    """The cache that a forward over `ids` starts."""
    with torch.no_grad():
        return model(ids, use_cache=True).past_key_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_codes_of_training(dtype, isa, calls):
    """The first block's keys and values come before anything that int8 could have changed."""
    model = int8_model("qwen3", dtype=dtype)
    assert accelerate_forward(model)
    cache = filled(model)
    with disable_quantizers(model):
        plain = filled(model)
    assert (type(cache), type(plain), calls) == (Int8Cache, DynamicCache, [75, 75])
    layer = cache.layers[0]
    for name in ("keys", "values"):
        codes, scales = quantize_activation(getattr(plain.layers[0], name))
        assert torch.equal(getattr(layer.codes, name), codes)
        assert torch.equal(getattr(layer.scales, name), scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits(dtype, isa, calls):
    """Prefill, and then token by token."""
    model = int8_model("qwen3", dtype=dtype)

    def stepwise(ids):
        cache, prompt = Int8Cache(model.config), ids.shape[1] - 5
        pieces = (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1))
        return torch.cat([model(piece, past_key_values=cache).logits for piece in pieces], 1)

    assert errors(model, stepwise).median() <= 2  # a code may round the other way
    assert calls == [70, *[1] * 5, *[4, *[1] * 5] * 4]


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if not family.mixer])
@pytest.mark.usefixtures("small_buffers")
def test_greedy_tokens(family, steps):
    model = int8_model(family)
    expected = generate(model, max_new_tokens=30)
    assert accelerate_forward(model)
    accelerate_generate(model)
    assert torch.equal(generate(model, max_new_tokens=30), expected)
    assert len(steps) == 29


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_tokens_of_transformers(options, steps):
    model = int8_model()
    expected = generate(model, **options)
    assert accelerate_forward(model)
    accelerate_generate(model)
    tokens = generate(model, **options)
    assert torch.equal(tokens, expected)
    assert steps == tokens[0, PROMPT.shape[1] : -1].tolist()


def test_a_cache_moves_between_both(calls):
    """Prefill here, continue there, and back: the cache is the same object, and holds int8 all the time."""
    model = int8_model()
    with torch.no_grad():
        expected = model(IDS).logits
        assert accelerate_forward(model)
        cache = Int8Cache(model.config)
        parts, keywords = IDS.split([10, 10, 9, 46], 1), {"past_key_values": cache}
        logits = [
            model(parts[0], **keywords).logits,
            model(parts[1], **keywords, output_hidden_states=True).logits,
            model(parts[2], **keywords).logits,
        ]
        cache.crop(-4)
        logits[2] = logits[2][:, :5]
        logits.append(model(IDS[:, 25:], **keywords).logits)
    assert calls == [10, 9, 50]
    torch.testing.assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 75
    assert cache.nbytes() == 2 * 2 * (2 * 75) * (16 + 4)


def test_the_cache_goes_on(steps):
    model = int8_model()
    assert accelerate_forward(model)
    accelerate_generate(model)
    expected, cache = generate(model), Int8Cache(model.config)
    first = generate(model, max_new_tokens=8, past_key_values=cache)
    assert cache.get_seq_length() == first.shape[1] - 1
    assert torch.equal(generate(model, first, max_new_tokens=12, past_key_values=cache), expected)


def test_a_float_cache_stays_with_transformers(calls):
    """It stores what has been quantized, as floats: another kind of content."""
    model = int8_model()
    with torch.no_grad():
        expected = model(IDS).logits
        assert accelerate_forward(model)
        cache = DynamicCache(config=model.config)
        torch.testing.assert_close(model(IDS, past_key_values=cache).logits, expected, rtol=1e-4, atol=1e-4)
        assert calls == []
        logits = model(IDS, use_cache=False).logits
    assert calls == [75]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_a_packed_directory_generates_so(tiny_llama, tmp_path, steps):
    model = tiny_llama()
    llmqat.prepare(model, QuantScheme(4, 32), kv_bits=8)
    llmqat.pack(model, tmp_path / "out")
    assert generate(llmqat.load(tmp_path / "out")).shape == (1, 27)
    assert len(steps) == 19
