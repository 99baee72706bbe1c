"""Models with towers decode their text natively; what images change of it goes through transformers."""

from itertools import product
from unittest.mock import patch

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

from llmqat.models.planning import plan
from llmqat.scheme import QuantScheme
from llmqat.serve import stacks
from llmqat.serve.attach import attach
from llmqat.serve.calls import sees_what_came
from llmqat.serve.covered import decoding_in_words
from llmqat.serve.forward import through_transformers
from llmqat.serve.paths import path_counts
from tests.serve.helpers import PROMPT, float_model, generate, packed_model

IDS = torch.arange(40)[None] * 7 % 128
PIXELS = torch.linspace(-1, 1, 3 * 28 * 56).view(1, 3, 28, 56)  # two tokens


STACKS = {"gemma3": "gemma3_text", "gemma4": "gemma4_text", "gemma4_unified": "gemma4_unified_text"}
STACKS |= {"mistral3": "ministral3"}


def served(family, beside, **options):
    return attach(packed_model(family, beside=beside, lm_head_bits=8, **options))


def agree(model, run):
    """Run natively and through transformers, and compare."""
    logits = run(model)
    with through_transformers(model):
        torch.testing.assert_close(logits, run(model), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("beside", "kv_bits"), [*product(STACKS, (None, 8)), ("qwen3_5", None)])
@torch.no_grad()
def test_text(beside, kv_bits):
    model = served(STACKS.get(beside, f"{beside}_text"), beside, kv_bits=kv_bits)
    expected = model(IDS).logits, generate(model)
    counts = path_counts(model)
    assert counts.all_native
    assert (counts.loop_tokens, counts.native_calls) == (19, 2)
    with through_transformers(model):
        torch.testing.assert_close(model(IDS).logits, expected[0], rtol=1e-3, atol=1e-3)
        assert torch.equal(generate(model), expected[1])


@torch.no_grad()
def test_images_of_which_only_embeddings_are_left(calls):
    """The blocks see no image: they run natively, and sampling is left to transformers."""
    model, ids = served("mistral", "mistral3"), IDS.clone()
    ids[0, 3:5] = 120
    images = {"pixel_values": PIXELS, "image_sizes": torch.tensor([[28, 56]])}
    agree(model, lambda model: model(ids, **images).logits)
    assert calls == [40]
    agree(model, lambda model: generate(model, ids, **images))
    assert calls == [40, 40] + [1] * 19
    assert "generate: image_sizes, pixel_values" in path_counts(model).summary()


@torch.no_grad()
def test_images_that_change_the_mask(calls):
    """Gemma 3 lets the tokens of an image see each other."""
    model, kinds = served("gemma3_text", "gemma3"), torch.zeros_like(IDS)
    agree(model, lambda model: model(IDS, token_type_ids=kinds).logits)
    generate(model, token_type_ids=torch.zeros_like(PROMPT))
    assert (calls, path_counts(model).loop_tokens) == ([40, 7] + [1] * 19, 19)
    kinds[0, 5:9] = 1
    agree(model, lambda model: model(IDS, token_type_ids=kinds).logits)
    assert len(calls) == 21
    assert "padding, or a mask of one's own (1)" in path_counts(model).summary()


@torch.no_grad()
def test_what_images_change_for_blocks(calls):
    """Qwen3-VL adds features of images to the hidden states of its first blocks, and gives places by axis."""
    model = served("qwen3_vl_text", "qwen3_vl")
    stack, places = model.model.language_model, torch.arange(5, 45).expand(3, 1, 40).clone()
    agree(model, lambda model: model(IDS, position_ids=places).logits)
    assert calls == [40]
    places[1, 0, 7:11] = 12
    agree(model, lambda model: model(IDS, position_ids=places).logits)
    seen = torch.arange(40)[None] == 4
    features = {"visual_pos_masks": seen, "deepstack_visual_embeds": [torch.ones(1, 64)]}
    agree(model, lambda _: stack(IDS, **features)[0])
    assert calls == [40]
    reasons = dict(path_counts(model).reasons)
    assert reasons["positions are not one range"] == 1
    assert reasons["blocks read visual_pos_masks, deepstack_visual_embeds too"] == 1


class Forced(LogitsProcessor):
    """Chooses the token that stands for an image as the fourth new one."""

    def __call__(self, input_ids, scores):
        if input_ids.shape[1] == PROMPT.shape[1] + 3:
            scores[:, 120] = 1e9
        return scores


def test_a_placeholder_is_read_as_padding(steps):
    model = served("gemma4_text", "gemma4")
    forced = {"logits_processor": LogitsProcessorList([Forced()])}
    agree(model, lambda model: generate(model, **forced))
    assert steps[3] == 120
    steps.clear()
    tokens, unread = generate(model, **forced), {**vars(stacks.GEMMA4), "placeholders": ()}
    with patch.dict(stacks.AROUND, gemma4=stacks.Around(**unread)):
        assert not torch.equal(generate(model, **forced), tokens)


UNKNOWN = "the native loop does not know what a model of type mistral3 does around its blocks"


def test_what_nobody_knows_around_the_blocks(monkeypatch, steps):
    """The blocks run natively, and transformers samples."""
    monkeypatch.delitem(stacks.AROUND, "mistral3")
    model = served("mistral", "mistral3")
    agree(model, generate)
    assert (path_counts(model).native_calls, steps) == (20, [])
    assert f"generate: {UNKNOWN}" in path_counts(model).summary()


def test_how_a_plan_will_be_decoded(monkeypatch):
    model = float_model("mistral", "mistral3")
    made = plan(model, QuantScheme(4, 32))
    assert decoding_in_words(model, made) == "blocks and sampling natively, towers in torch"
    monkeypatch.delitem(stacks.AROUND, "mistral3")
    assert decoding_in_words(model, made) == f"blocks natively, sampling in transformers ({UNKNOWN})"


PAST, TOKENS, WINDOW = 6, 3, 4
CAUSAL = torch.ones(TOKENS, PAST + TOKENS, dtype=torch.bool).tril(PAST)
BANDED = CAUSAL.triu(PAST - WINDOW + 1)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16], ids=str)
def test_masks(dtype):
    def sees(mask, window):
        if dtype != torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)
        return sees_what_came(mask[None, None], TOKENS, PAST, window)

    assert sees(CAUSAL, 100)
    assert sees(BANDED, WINDOW)
    assert sees(BANDED[:, PAST - WINDOW + 1 :], WINDOW), "of a cache that forgets"
    assert not sees(CAUSAL, WINDOW)
    assert not sees(BANDED, 100)
    assert not sees(CAUSAL[:, 1:], 100), "a token that is seen is gone"
    assert not sees(BANDED[:, PAST - WINDOW + 2 :], WINDOW)
    assert not sees(torch.ones_like(CAUSAL), 100)
    assert not sees(CAUSAL[:2], 100)
