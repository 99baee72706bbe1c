"""Whatever a call asks for, a packed model with its native path gives what the code of transformers gives."""

from copy import deepcopy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from llmqat.compat.caches import cache_of, generate_cache_name
from llmqat.errors import LlmqatError
from llmqat.nn.packed_linear import PackedLinear
from llmqat.serve.attach import attach
from llmqat.serve.paths import path_counts
from tests.serve.helpers import PROMPT, generate, packed_model

IDS = torch.arange(12)[None] * 7 % 128
NAME = generate_cache_name()
# What transformers raises of these calls, in one version or another.
REFUSALS = (ValueError, RuntimeError, IndexError, TypeError, AttributeError)


def pair(**options):
    """The same packed model twice: with its native path, and without."""
    return attach(packed_model("llama", **options)), attach(packed_model("llama", **options), native=False)


def agree(native, plain, run):
    """Run both, and compare: tensors, or the same kind of error."""
    with torch.no_grad():
        try:
            expected = run(plain)
        except REFUSALS as error:
            with pytest.raises(REFUSALS):
                run(native)
            return str(error)
        torch.testing.assert_close(run(native), expected, rtol=1e-4, atol=1e-4)
    return ""


MASKED = torch.ones(1, 12, dtype=torch.long)
MASKED[0, :3] = 0
CALLS = {
    "one position for all": {"position_ids": torch.zeros(1, 1, dtype=torch.long)},
    "shifted": {"position_ids": torch.arange(5, 17)[None]},
    "backwards": {"position_ids": torch.arange(11, -1, -1)[None]},
    "packed sequences": {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]])},
    "positions of two rows": {"position_ids": torch.arange(12).repeat(2, 1)},
    "too few positions": {"position_ids": torch.arange(7)[None]},
    "left padding": {"attention_mask": MASKED},
    "long mask": {"attention_mask": torch.ones(1, 20, dtype=torch.long)},
    "4-D mask": {"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()},
    "a mask that sees all": {"attention_mask": torch.ones(1, 1, 12, 12, dtype=torch.bool)},
    "int32 ids": {"input_ids": IDS.int()},
    "two rows": {"input_ids": IDS.repeat(2, 1)},
    "nothing": {"input_ids": IDS[:, :0]},
    "one dimension": {"input_ids": IDS[0]},
    "tuples": {"return_dict": False},
    "negative ids": {"input_ids": -IDS},
    "unknown ids": {"input_ids": IDS + 120},
    "all hidden states": {"output_hidden_states": True},
}


@pytest.mark.parametrize("arguments", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("lm_head_bits", [None, 8])
def test_calls(arguments, lm_head_bits):
    agree(*pair(lm_head_bits=lm_head_bits), lambda model: model(**{"input_ids": IDS} | arguments)[0].clone())


def test_embeddings_in_the_place_of_ids():
    native, plain = pair()
    embeds = plain.model.embed_tokens(IDS).detach()
    agree(native, plain, lambda model: model(inputs_embeds=embeds).logits)
    assert path_counts(native).native_calls == 1
    agree(native, plain, lambda model: model(inputs_embeds=embeds.repeat(2, 1, 1)).logits)
    agree(native, plain, lambda model: model(inputs_embeds=embeds.double()).logits)
    assert agree(native, plain, lambda model: model(input_ids=IDS, inputs_embeds=embeds).logits)
    assert agree(native, plain, lambda model: model().logits)


CACHES = {
    "of the config": lambda model: DynamicCache(config=model.config),
    "of no config": lambda model: DynamicCache(),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=24),
}


@pytest.mark.parametrize("start", CACHES.values(), ids=CACHES)
def test_caches_go_on(start):
    def run(model):
        cache = start(model)
        return torch.cat([model(part, **{NAME: cache}).logits for part in IDS.split([5, 1, 6], 1)], 1)

    agree(*pair(), run)


def test_a_cache_of_two_rows_does_not_take_one():
    def run(model):
        cache = DynamicCache(config=model.config)
        model(IDS.repeat(2, 1)[:, :5], **{NAME: cache})
        return model(IDS[:, 5:], **{NAME: cache}).logits

    assert agree(*pair(), run)


def test_a_cache_that_was_cropped_copied_and_used_again():
    def run(model):
        cache = DynamicCache(config=model.config)
        model(IDS, **{NAME: cache})
        cache.crop(-4)
        twin = deepcopy(cache)
        first = model(IDS[:, 8:], **{NAME: cache}).logits
        return torch.cat([first, model(IDS[:, 8:] + 1, **{NAME: twin}).logits], 1)

    agree(*pair(), run)


def test_a_cache_of_another_dtype():
    def run(model):
        cache = DynamicCache(config=model.config)
        model(IDS[:, :5], **{NAME: cache})
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.double(), layer.values.double()
        return model(IDS[:, 5:], **{NAME: cache}).logits

    agree(*pair(), run)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_both_names_of_the_cache(name):
    model = attach(packed_model("llama"))
    with torch.no_grad():
        expected = model(IDS).logits[:, -1]
        cache = cache_of(model(IDS[:, :-1], use_cache=True))
        torch.testing.assert_close(
            model.model(IDS[:, -1:], **{name: cache})[0], model.model(IDS)[0][:, -1:], rtol=1e-4, atol=1e-4
        )
    assert expected.shape == (1, 128)
    with pytest.raises(LlmqatError, match="past is no argument of this model"), torch.no_grad():
        model.model(IDS[:, -1:], past=cache)


GENERATED = {
    "beams": {"num_beams": 3},
    "several": {"num_return_sequences": 2, "do_sample": True},
    "a batch": {"prompt": PROMPT.repeat(2, 1)},
    "padded": {"prompt": PROMPT.repeat(2, 1), "attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])},
    "no cache": {"use_cache": False},
    "int32": {"prompt": PROMPT.int()},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "positions": {"position_ids": torch.arange(3, 10)[None]},
    "scores": {"output_scores": True, "return_dict_in_generate": False},
    "static": {"cache_implementation": "static"},
    "processors": {"repetition_penalty": 1.5, "min_new_tokens": 4},
    "embeddings": {"inputs_embeds": torch.linspace(-1, 1, 5 * 64).view(1, 5, 64)},
}


@pytest.mark.parametrize("options", GENERATED.values(), ids=GENERATED)
def test_generated_tokens(options):
    agree(*pair(), lambda model: generate(model, **{"pad_token_id": 0} | options).clone())


def test_an_assistant():
    native, plain = pair()
    agree(native, plain, lambda model: generate(model, assistant_model=plain, pad_token_id=0).clone())


def tensors_of(model):
    """Names of every tensor below the embedding, and those of both ends."""
    return [name for name, _ in (*model.named_parameters(), *model.named_buffers()) if "shape" not in name]


@torch.no_grad()
def test_every_tensor_may_be_replaced():
    """In all blocks, norms and ends: the next call runs on the new one."""
    native = attach(packed_model("llama", scheme=None))
    native(IDS)
    for name in tensors_of(native):
        path, attribute = name.rsplit(".", 1)
        owner = native.get_submodule(path)
        old = getattr(owner, attribute)
        if old.dtype == torch.int32 or "inv_freq" in name or old.numel() == 0:
            continue
        new = old.detach() * 1.5
        setattr(owner, attribute, torch.nn.Parameter(new) if isinstance(old, torch.nn.Parameter) else new)
        got = native(IDS).logits
        forward = vars(native.model).pop("forward")
        torch.testing.assert_close(got, native(IDS).logits, rtol=1e-3, atol=1e-3, msg=name)
        native.model.forward = forward
        setattr(owner, attribute, old)


@torch.no_grad()
def test_blocks_that_no_longer_fit_are_left_to_transformers():
    native = attach(packed_model("llama"))
    expected = native(IDS).logits
    layer = native.model.layers[0].mlp.up_proj
    assert isinstance(layer, PackedLinear)
    dense = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    codes, scale, _ = layer.unpack()
    dense.weight = torch.nn.Parameter(codes.float() * scale.float().repeat_interleave(32, 1))
    native.model.layers[0].mlp.up_proj = dense
    torch.testing.assert_close(native(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert "a layer of a block is not packed" in path_counts(native).summary()
    native.model.layers[0].mlp.up_proj = layer
    native.model.layers[1].input_layernorm.weight.data = torch.ones(3)
    with pytest.raises(RuntimeError, match="size of tensor"):
        native(IDS)
