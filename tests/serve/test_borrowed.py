"""The decoder notices that the model no longer holds what it borrowed, without a walk through the modules."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from llmqat.serve.attach import attach
from llmqat.serve.blocks import decoder_of
from llmqat.serve.borrowed import Borrowed
from tests.serve.helpers import generate, packed_model


def set_buffer(stack):
    layer = stack.layers[1].mlp.down_proj
    layer.weight_scale = layer.weight_scale.clone()


def set_data(stack):
    norm = stack.layers[0].post_attention_layernorm
    norm.weight.data = norm.weight.data.clone()


def add_bias(stack):
    layer = stack.layers[0].self_attn.o_proj
    layer.bias = torch.zeros(layer.out_features)


def set_scheme(stack):
    layer = stack.layers[1].self_attn.q_proj
    layer.scheme = replace(layer.scheme, act_bits=8)


def swap_layers(stack):
    first, second = stack.layers
    stack.layers[0], stack.layers[1] = second, first


CHANGES = {
    "buffer": set_buffer,
    "data": set_data,
    "bias": add_bias,
    "scheme": set_scheme,
    "blocks": swap_layers,
    "list of blocks": lambda stack: setattr(stack, "layers", nn.ModuleList(stack.layers)),
    "fewer blocks": lambda stack: stack.layers.pop(1),
    "last norm": lambda stack: setattr(stack.norm, "weight", nn.Parameter(stack.norm.weight.detach() * 2)),
    "hook": lambda stack: stack.layers[0].mlp.register_forward_hook(lambda *_: None),
    "pre-hook": lambda stack: stack.norm.register_forward_pre_hook(lambda *_: None),
    "second hook": lambda stack: stack.layers[0].self_attn.register_forward_pre_hook(lambda *_: None),
    "dtype": lambda stack: stack.to(torch.bfloat16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_noticed(change):
    stack = packed_model("llama", kv_bits=8).model
    borrowed = Borrowed.of(stack)
    assert borrowed.is_unchanged()
    assert not borrowed.listeners
    change(stack)
    assert not borrowed.is_unchanged()
    assert Borrowed.of(stack).is_unchanged()


def test_a_known_decoder_is_found_without_a_walk(monkeypatch):
    """Of modules or their tensors: they would cost as much as a small model does."""
    stack = attach(packed_model("llama")).model
    decoder = decoder_of(stack)
    monkeypatch.setattr(nn.Module, "named_modules", lambda *_, **__: pytest.fail("walked"))
    assert decoder_of(stack) is decoder


def test_nothing_is_compared_between_two_tokens(monkeypatch):
    model = attach(packed_model("llama", lm_head_bits=8))
    asked = []
    monkeypatch.setattr(Borrowed, "is_unchanged", lambda self: asked.append(self) or True)
    generate(model, max_new_tokens=3)
    few = len(asked)
    generate(model, max_new_tokens=30)
    assert len(asked) == 2 * few + 1  # the first one built the decoder
