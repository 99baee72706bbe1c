import copy
import os

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmqat.errors import LlmqatError
from llmqat.train import sharding
from llmqat.train.sharding import ShardedModel, gathering_of
from tests.pretended_device import PRETENDED
from tests.two_processes import run_in_two

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 30}
CPU = torch.device("cpu")


def teacher(dtype=torch.bfloat16):
    """A frozen float32 model whose weights have the values of `dtype`."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.data = (parameter + 0.1 * torch.randn_like(parameter)).to(dtype).float()
    return model


def test_8_bit_optimizers_are_refused_under_fsdp2(monkeypatch):
    monkeypatch.setattr(sharding, "sharding_requested", lambda: True)
    with pytest.raises(LlmqatError, match=r"adamw8bit does not run under FSDP2: bitsandbytes updates whole"):
        sharding.prepare_model(None, nn.Linear(2, 2), [], None, "adamw8bit")


def test_a_teacher_is_gathered_in_the_dtype_of_autocast_if_no_bit_depends_on_it():
    block = teacher().model.layers[0]
    assert gathering_of(block, torch.bfloat16).param_dtype == torch.bfloat16
    assert gathering_of(block, None).param_dtype is None
    block.mlp.up_proj.weight.data += 1e-6  # cast anyway
    assert gathering_of(block, torch.bfloat16).param_dtype == torch.bfloat16
    block.mlp.up_proj.requires_grad_(True)
    assert gathering_of(block, torch.bfloat16).param_dtype is None
    assert gathering_of(teacher(torch.float32).model.layers[0], torch.bfloat16).param_dtype is None


def test_a_model_is_whole_on_its_device_again(pretended, monkeypatch):
    """Where codes are counted after training; it comes from the CPU, tensor by tensor."""
    model = teacher().to(PRETENDED)
    sharded = ShardedModel.__new__(ShardedModel)
    sharded.model, sharded.device = model, PRETENDED
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    sharded.unsharded = copy.deepcopy(model, memo)
    monkeypatch.setattr(sharding, "gathered", lambda tensor, everywhere: tensor.cpu())
    monkeypatch.setattr(sharding, "forget_sharded", lambda model: None)
    sharded.gather(everywhere=False)
    assert {tensor.device for tensor in (*model.parameters(), *model.buffers())} == {PRETENDED}


def member(rank):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    model, ids = teacher(), torch.arange(12).view(2, 6)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(ids).logits
        for everywhere in (True, False):
            sharded = ShardedModel(model, CPU, torch.bfloat16)
            assert torch.equal(model(ids).logits, expected)
            sharded.gather(everywhere)
            if everywhere or rank == 0:
                assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
            else:
                assert all(parameter.is_meta for parameter in model.parameters())


def test_a_sharded_model_gives_the_same_bits_and_comes_back_whole(tmp_path):
    run_in_two(member, tmp_path)
