"""The native decoder gives the tokens and logits of the transformers code, and leaves it everything else."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, StaticCache

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.scheme import QuantScheme
from llmqat.serve import blocks
from llmqat.serve.attach import attach
from llmqat.serve.calls import is_range
from llmqat.serve.families import FAMILIES
from llmqat.serve.forward import accelerate_forward, through_transformers
from llmqat.serve.paths import path_counts
from tests.serve.helpers import both, errors, generate, packed_model


@torch.no_grad()
def accelerated(tokens, family, **options):
    """A native model, so many ids, and the logits that it gave through transformers."""
    model, ids = packed_model(family, **options), torch.randint(0, 128, (1, tokens))
    expected = model(ids).logits
    assert accelerate_forward(model)
    return model, ids, expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("act_bits", [None, 8])
def test_logits(family, act_bits, calls):
    model = packed_model(family, QuantScheme(4, 32, act_bits=act_bits))
    found = errors(model, lambda ids: model(ids).logits)
    # An int8 code of equal distance to both sides may round the other way.
    assert (found.median() if act_bits else found.max()) <= 2
    assert calls == [75, 9, 9, 9, 9]


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, torch.bfloat16) for family in FAMILIES]
    + [(family, torch.float16) for family in ("qwen3", "gemma2", "olmo2", "glm4")],
)
def test_sixteen_bit_activations(dtype, family, calls):
    model = packed_model(family, dtype=dtype)
    assert errors(model, lambda ids: model(ids).logits).max() <= 2
    assert calls == [75, 9, 9, 9, 9]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("small_buffers")
def test_greedy_tokens(family, calls):
    model = packed_model(family)
    prompt = torch.randint(0, 128, (1, 7))
    expected, tokens = both(model, lambda: model.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=-1))
    assert torch.equal(tokens, expected)
    assert calls == [7] + [1] * 29


def test_fused_layers_with_zero_points(bits, calls):
    """Their parts begin in the middle of the packed zero points."""
    model = packed_model("phi3", QuantScheme(bits, 32, symmetric=False))
    ids = torch.randint(0, 128, (1, 20))
    with torch.no_grad():
        expected, logits = both(model, lambda: model(ids).logits)
    assert calls == [20]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"attn_logit_softcapping": None}, {"query_pre_attn_scalar": 20}], ids=str)
def test_what_the_config_of_gemma_says(options, calls):
    """Each matters at this size, and the native decoder follows it."""
    ids = torch.randint(0, 128, (1, 40))
    with torch.no_grad():
        plain = packed_model("gemma2")(ids).logits
        model = packed_model("gemma2", **options)
        expected, logits = both(model, lambda: model(ids).logits)
    assert calls == [40]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)


def without(part):
    """A change of blocks as the decoder gets them: without a layer, a norm or a factor."""

    def change(block):
        linears = {name: linear for name, linear in block.linears.items() if name != part}
        norms = {name: norm for name, norm in block.norms.items() if name != part}
        return replace(block, linears=linears, norms=norms, scale=None if part == "scale" else block.scale)

    return change


@pytest.fixture(scope="module")
def gemma4():
    return attach(packed_model("gemma4_text"))


@pytest.mark.parametrize("part", ["scale", "v_norm", "side_gate", "side_norm"])
@torch.no_grad()
def test_what_gemma4_has_and_others_do_not(part, gemma4, monkeypatch):
    """Each part matters at this size; the k that are values, and those of another block, have no place without."""
    ids, built = torch.randint(0, 128, (1, 40)), blocks._block
    logits = gemma4(ids).logits
    with through_transformers(gemma4):
        torch.testing.assert_close(logits, gemma4(ids).logits, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(blocks, "_block", lambda *given: without(part)(built(*given)))
    monkeypatch.delitem(blocks._built, gemma4.model)
    assert not torch.allclose(gemma4(ids).logits, logits, rtol=1e-2, atol=1e-2)
    del blocks._built[gemma4.model]


@torch.no_grad()
def test_side_inputs_that_are_given(gemma4, calls):
    """With embeddings, as models with towers do, or found by them; with ids they are refused."""
    ids = torch.randint(0, 128, (1, 9))
    embeds, logits = gemma4.model.embed_tokens(ids), gemma4(ids).logits
    side = gemma4.model.get_per_layer_inputs(ids)
    for given in ({}, {"per_layer_inputs": side}):
        torch.testing.assert_close(gemma4(inputs_embeds=embeds, **given).logits, logits, rtol=1e-4, atol=1e-4)
    assert calls == [9, 9, 9]
    assert not torch.allclose(gemma4(inputs_embeds=embeds, per_layer_inputs=-side).logits, logits, atol=1e-2)
    with pytest.raises(ValueError, match="cannot specify per_layer_inputs if input_ids is provided"):
        gemma4(ids, per_layer_inputs=side)


WINDOWS = {
    "mistral": {"sliding_window": 8},
    "phi3": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
}


@pytest.mark.parametrize("whole", [False, True], ids=["window", "whole"])
@pytest.mark.parametrize("family", WINDOWS)
def test_windows(family, whole, calls):
    """Prefill and decoding, over a cache that forgets and over one that does not."""
    model = packed_model(family, **WINDOWS[family])
    ids = torch.randint(0, 128, (1, 75))

    def run():
        cache = DynamicCache(config=None if whole else model.config)
        logits = [model(piece, past_key_values=cache).logits for piece in (ids[:, :50], *ids[:, 50:].split(1, dim=1))]
        return torch.cat(logits, 1), cache

    with torch.no_grad():
        (expected, theirs), (logits, cache) = both(model, run)
        full = packed_model(family)(ids).logits
    assert calls == [50] + [1] * 25
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(full[:, 8:], expected[:, 8:], rtol=1e-2, atol=1e-2)
    for layer, known in zip(cache.layers, theirs.layers, strict=True):
        torch.testing.assert_close(layer.keys, known.keys, rtol=1e-4, atol=1e-4)
        assert layer.get_seq_length() == known.get_seq_length() == 75


def test_a_cache_that_records_the_past(calls):
    """As assisted generation does, to go back beyond a window."""
    model = packed_model("mistral", sliding_window=8)
    ids = torch.randint(0, 128, (1, 30))

    def run():
        cache = DynamicCache(config=model.config)
        for layer in cache.layers:
            layer.activate_past_recording()
        model(ids[:, :20], past_key_values=cache)
        cache.crop(-5)
        return model(ids[:, 15:], past_key_values=cache).logits

    with torch.no_grad():
        expected, logits = both(model, run)
    assert calls == [20, 15]
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "options"),
    [("mistral", {}), ("mistral", WINDOWS["mistral"]), ("gemma4_text", {}), ("qwen3_5_text", {})],
    ids=["full", "window", "shared", "mixers"],
)
def test_a_cache_moves_between_both(family, options, calls):
    """Prefill here, continue there, and back: the cache is the same object."""
    model, ids, expected = accelerated(30, family, **options)
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :10], past_key_values=cache).logits
        second = model(ids[:, 10:20], past_key_values=cache, output_hidden_states=True).logits
        third = model(ids[:, 20:29], past_key_values=cache).logits
        fourth = model(ids[:, 29:], past_key_values=cache).logits
    assert calls == [10, 9, 1]
    torch.testing.assert_close(torch.cat([first, second, third, fourth], 1), expected, rtol=1e-4, atol=1e-4)
    assert cache.get_seq_length() == 30


@torch.no_grad()
def test_a_cache_without_the_layers_of_mixers(calls):
    """One that is made for no config has layers for attention alone, as transformers says."""
    model, ids, _ = accelerated(9, "qwen3_5_text")
    with pytest.raises((ValueError, AttributeError, IndexError)):
        model(ids, past_key_values=DynamicCache())
    assert calls == []
    assert "the cache has 0 layers for 3 blocks" in path_counts(model).summary()


def test_a_copied_cache(calls):
    """As a prompt that is computed once and gone on from more than once."""
    model, ids, expected = accelerated(12, "llama")
    with torch.no_grad():
        prompt = DynamicCache(config=model.config)
        model(ids[:, :8], past_key_values=prompt)
        for _ in range(2):
            cache = deepcopy(prompt)
            logits = [model(token, past_key_values=cache).logits for token in ids[:, 8:].split(1, dim=1)]
            torch.testing.assert_close(torch.cat(logits, 1), expected[:, 8:], rtol=1e-4, atol=1e-4)
    assert calls == [8] + [1] * 8


def test_a_cropped_cache(calls):
    model, ids, expected = accelerated(12, "llama")
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.cat([ids[:, :8], ids[:, :3]], 1), past_key_values=cache)
        cache.crop(-3)
        torch.testing.assert_close(
            model(ids[:, 8:], past_key_values=cache).logits, expected[:, 8:], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "arguments",
    [
        {"input_ids": torch.ones(2, 5, dtype=torch.long)},
        {"attention_mask": torch.tensor([[0, 1, 1, 1, 1]])},
        {"output_hidden_states": True},
        {"past_key_values": "static"},
    ],
    ids=lambda a: next(iter(a)),
)
def test_what_transformers_keeps(arguments, calls):
    model = packed_model("llama")
    if arguments.get("past_key_values") == "static":
        arguments = {"past_key_values": StaticCache(config=model.config, max_cache_len=16)}
    assert accelerate_forward(model)
    with torch.no_grad():
        model(**{"input_ids": torch.ones(1, 5, dtype=torch.long)} | arguments)
    assert calls == []


def test_gradients_are_not_swallowed(calls):
    model = packed_model("llama")
    assert accelerate_forward(model)
    with pytest.raises(LlmqatError, match="packed layers have no gradient"):
        model(torch.ones(1, 5, dtype=torch.long)).logits.sum().backward()
    assert calls == []


def test_a_cast_model_runs_on_its_new_tensors(calls):
    model = packed_model("llama")
    assert accelerate_forward(model)
    ids = torch.randint(0, 128, (1, 20))
    with torch.no_grad():
        full = model(ids).logits
        half = model.bfloat16()(ids).logits
    assert calls == [20, 20]
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.1, atol=0.1)


def test_a_copy_runs_on_its_own_tensors(calls):
    model = packed_model("llama")
    assert accelerate_forward(model)
    ids = torch.randint(0, 128, (1, 9))
    with torch.no_grad():
        model(ids)
        twin = deepcopy(model)
        expected = twin(ids).logits
        for parameter in model.model.parameters():
            parameter.zero_()
        assert torch.equal(twin(ids).logits, expected)
    assert calls == [9, 9, 9]


@torch.no_grad()
def test_left_to_transformers_for_a_while(calls):
    model, ids = attach(packed_model("llama")), torch.randint(0, 128, (1, 5))
    forward, tokens = vars(model.model)["forward"], generate(model)
    calls.clear()
    before = path_counts(model)
    with through_transformers(model):
        logits = model(ids).logits
        assert torch.equal(generate(model), tokens)
        between = path_counts(model) - before
    assert (calls, between.loop_tokens, between.native_calls) == ([], 0, 0)
    assert dict(between.reasons) == {"generate: the blocks are left to transformers": 1}
    assert vars(model.model)["forward"] is forward
    torch.testing.assert_close(model(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert calls == [5]
    never = packed_model("gpt_neox", head_dim=None)
    with through_transformers(never):
        never(ids)
    assert "forward" not in vars(never)


def test_models_that_do_not_fit(monkeypatch):
    assert not accelerate_forward(packed_model("gpt_neox", head_dim=None))
    assert not accelerate_forward(packed_model("llama", hidden_act="gelu"))
    assert not accelerate_forward(packed_model("llama", QuantScheme(4, 8)))
    assert not accelerate_forward(packed_model("llama", QuantScheme(4, 32, act_bits=8, act_static=True)))
    one_head = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 18}
    assert accelerate_forward(packed_model("phi3", QuantScheme(4, -1), **one_head))
    assert not accelerate_forward(packed_model("phi3", QuantScheme(4, -1, symmetric=False), **one_head)), "mid-word"
    monkeypatch.setattr(native, "library", lambda: None)
    assert not accelerate_forward(packed_model("llama"))


@pytest.mark.parametrize("ids", ["x", 3, [[1, 2]]], ids=str)
def test_ids_that_are_no_tensor_get_the_error_of_transformers(ids):
    model, *_ = accelerated(12, "llama")
    with torch.no_grad(), pytest.raises(TypeError, match=r"argument 'indices' .* must be Tensor"):
        model(ids)


@pytest.mark.parametrize("kind", ["list", "number", "flat", "bool", "meta", "sparse", "gap", "longer"])
def test_what_is_no_range_of_positions(kind):
    """Where the native path cannot read it, transformers gets it, and says what it has to say."""
    plain = torch.arange(4, 7)[None]
    assert is_range(plain, 3)
    others = {"list": plain.tolist(), "number": 3, "flat": plain[0], "bool": plain.bool(), "meta": plain.to("meta")}
    others |= {"sparse": plain.to_sparse(), "gap": plain * 2, "longer": torch.arange(4)[None]}
    assert not is_range(others[kind], 3)
