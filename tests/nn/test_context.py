"""Ids and positions beyond a model's tables: one line, everywhere."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

import llmqat
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Windows, evaluate
from llmqat.nn.context import check_context, check_sequence, check_token_ids, position_limit
from llmqat.scheme import QuantScheme
from tests.serve.helpers import float_model


def gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=16, n_embd=32, n_layer=1, n_head=2)).eval()


def test_the_limit_is_that_of_the_table(tiny_llama):
    config = OPTConfig(hidden_size=32, num_hidden_layers=1, ffn_dim=32, max_position_embeddings=24, vocab_size=64)
    config.num_attention_heads, config.word_embed_proj_dim = 2, 32
    assert position_limit(gpt2()) == 16
    assert position_limit(OPTForCausalLM(config)) == 24
    assert position_limit(tiny_llama()) is None
    assert position_limit(float_model("gemma3_text", "gemma3")) is None, "4 patches of an image have places in a table"


def test_positions():
    check_context(None, 10**6)
    check_context(16, 16)
    with pytest.raises(LlmqatError, match="17 tokens exceed the 16 positions of the model; shorten the prompt, or"):
        check_context(16, 17)
    with pytest.raises(LlmqatError, match="20 tokens exceed the 16 positions"):
        check_sequence(gpt2(), torch.zeros(1, 10, dtype=torch.long), 10)


@pytest.mark.parametrize("wrong", [-1, 96, 10**9, -(10**9)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_token_ids(wrong, dtype):
    with pytest.raises(LlmqatError, match=f"token id {wrong} is out of range: the model's vocabulary has the ids 0 to"):
        check_token_ids(torch.tensor([[0, wrong]], dtype=dtype), 96)
    check_token_ids(torch.tensor([[0, 95]], dtype=dtype), 96)
    check_token_ids(torch.empty(1, 0, dtype=dtype), 96)


@torch.no_grad()
def test_a_packed_model_refuses_them(tmp_path):
    model = gpt2()
    llmqat.prepare(model, QuantScheme(4, 32))
    llmqat.pack(model, tmp_path)
    packed, ids = llmqat.load(tmp_path), torch.ones(1, 12, dtype=torch.long)
    assert packed(ids).logits.shape == (1, 12, 96)
    with pytest.raises(LlmqatError, match="17 tokens exceed the 16 positions"):
        packed(torch.ones(1, 17, dtype=torch.long))
    with pytest.raises(LlmqatError, match="41 tokens exceed the 16 positions"):
        packed(ids, position_ids=torch.arange(29, 41)[None])
    with pytest.raises(LlmqatError, match="token id 96 is out of range"):
        packed(ids * 96)
    with pytest.raises(LlmqatError, match="the inputs are on meta, where they have no values; give them on cpu"):
        packed(ids.to("meta"))
    with pytest.raises(LlmqatError, match="17 tokens exceed the 16 positions"):
        packed.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0, eos_token_id=-1)


def test_evaluation_refuses_them():
    with pytest.raises(LlmqatError, match="20 tokens exceed the 16 positions"):
        evaluate(gpt2(), Windows(torch.ones(2, 20, dtype=torch.long), "none"))
