"""Models of transformers attend in tiles while they train, and as before where tiles do not do."""

from contextlib import nullcontext, suppress

import pytest
import torch
from transformers import (
    AttentionInterface,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from llmqat.kernels import attention
from llmqat.kernels.attention import has_attention
from llmqat.nn import native_attention as module
from llmqat.nn.native_attention import native_attention
from tests.conftest import TINY

pytestmark = pytest.mark.skipif(not has_attention(), reason="attention of training needs tiles (AMX)")

IDS = torch.arange(2 * 24).reshape(2, 24) % 128
PADDED = torch.ones_like(IDS)
PADDED[0, :5] = PADDED[1, 20:] = 0


@pytest.fixture
def calls(monkeypatch):
    """What the tiles were called with."""
    seen = []

    def counting(*arguments):
        seen.append(arguments)
        return attention.attend(*arguments)

    monkeypatch.setattr(module, "attend", counting)
    return seen


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | changes))


def step(model, context, mask=None, dtype=torch.bfloat16):
    """Loss and gradients of a training step."""
    model.train()
    model.zero_grad()
    with context, torch.autocast("cpu", dtype, enabled=dtype is not None):
        loss = model(input_ids=IDS, attention_mask=mask, labels=IDS, use_cache=False).loss
        loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def check_like_torch(model, mask=None):
    """As near to float32 as torch is in bfloat16."""
    exact = step(model, nullcontext(), mask, dtype=None)
    other, own = step(model, nullcontext(), mask), step(model, native_attention(), mask)
    assert (own[0] - exact[0]).abs() <= 1.5 * (other[0] - exact[0]).abs() + 0.01
    assert (own[1] - exact[1]).norm() <= 1.2 * (other[1] - exact[1]).norm()


def test_a_step_of_llama(calls):
    check_like_torch(llama())
    assert len(calls) == 2


@pytest.mark.parametrize(
    "mask", [PADDED, PADDED.bool()[:, None, None] & torch.ones(24, 24).tril().bool()], ids=["2d", "4d"]
)
def test_padding(calls, mask):
    check_like_torch(llama(), mask)
    assert len(calls) == 2


def test_windows(calls):
    torch.manual_seed(0)
    check_like_torch(MistralForCausalLM(MistralConfig(**TINY | {"sliding_window": 7})), PADDED)
    assert len(calls) == 2


def test_without_groups_or_rotary(calls):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=128, n_embd=64, n_layer=1, n_head=4, n_positions=64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    check_like_torch(GPT2LMHeadModel(config))
    assert len(calls) == 1


def test_gradient_checkpointing(calls):
    model = llama()
    before = step(model, native_attention())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    after = step(model, native_attention())
    assert torch.equal(before[1], after[1])
    assert len(calls) == 2 + 4


def test_without_gradients(calls):
    model = llama().eval().bfloat16()
    with torch.no_grad(), native_attention():
        own = model(IDS).logits
    assert len(calls) == 2
    torch.testing.assert_close(own, model(IDS).logits, atol=0.1, rtol=0.05)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"dtype": None}),
        ({}, {"dtype": torch.float16}),
        ({"attention_dropout": 0.1}, {}),
        ({"num_attention_heads": 8}, {}),  # of 8 features
        ({"attn_implementation": "eager"}, {}),
        ({}, {"mask": torch.zeros(2, 1, 24, 24)}),
        ({}, {"mask": torch.rand(2, 1, 24, 24) < 0.5}),
    ],
    ids=["float32", "float16", "dropout", "small heads", "eager", "float mask", "holes"],
)
def test_what_torch_does_as_before(calls, changes, options):
    model = llama(**changes)
    torch.manual_seed(0)
    before = step(model, nullcontext(), **options)
    torch.manual_seed(0)
    after = step(model, native_attention(), **options)
    assert torch.equal(before[1], after[1])
    assert not calls


def test_the_function_is_put_back():
    before = AttentionInterface()["sdpa"]
    with native_attention():
        once = AttentionInterface()["sdpa"]
        assert once is not before
        with native_attention():
            assert AttentionInterface()["sdpa"] is once
        assert AttentionInterface()["sdpa"] is once
    assert AttentionInterface()["sdpa"] is before
    with suppress(ValueError), native_attention():
        raise ValueError
    assert AttentionInterface()["sdpa"] is before


def test_torch_trains_where_it_is_asked_to(monkeypatch, calls):
    monkeypatch.setattr(module, "has_attention", lambda: False)
    step(llama(), native_attention())
    assert not calls
