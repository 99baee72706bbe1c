import pytest
import torch
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from llmqat.algorithms.block_calls import Arguments
from llmqat.algorithms.blocks import (
    BlockInputs,
    _add_square,
    _mirrored,
    hessians_of,
    layers_of,
    passes_of,
    stages_of,
)
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from tests.algorithms.helpers import STAGES, prepared
from tests.narrow_products import narrow_products


def test_stages_in_running_order(tiny_llama, tokens):
    model, _ = prepared(tiny_llama())
    block = model.model.layers[0]
    inputs = BlockInputs.capture(model, [block], tokens)
    assert len(inputs.hidden) == len(tokens)
    assert stages_of(block, inputs, layers_of(block)) == STAGES


@pytest.mark.parametrize("scheme", [QuantScheme(4, 16), QuantScheme(4, 16, act_bits=8, act_static=True)], ids=str)
def test_layers_that_quantize_their_input_differently_share_no_hessian(tiny_llama, tokens, scheme):
    dynamic = {"act_bits": 8, "act_static": False}
    model, _ = prepared(tiny_llama(), scheme, overrides={"k_proj": dynamic}, calibration=tokens)
    block = model.model.layers[0]
    stages = stages_of(block, BlockInputs.capture(model, [block], tokens), layers_of(block))
    assert stages == [["self_attn.q_proj", "self_attn.v_proj"], ["self_attn.k_proj"], *STAGES[1:]]


def test_each_block_keeps_its_own_arguments():
    """Gemma's blocks differ: masks and rotary embeddings of sliding and of full attention."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    kinds = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**sizes, **heads, sliding_window=4, layer_types=kinds)
    model = Gemma3ForCausalLM(config).eval()
    batches = list(torch.randint(0, 128, (2, 2, 12)))
    blocks = model.model.layers
    inputs = BlockInputs.capture(model, list(blocks), batches)
    with torch.no_grad():
        for block in blocks:
            inputs.advance(block)
        expected = [model.model(input_ids=batch).last_hidden_state for batch in batches]
        assert all(torch.equal(model.model.norm(h), e) for h, e in zip(inputs.hidden, expected, strict=True))
    assert inputs.arguments == [[]]
    assert not any("forward" in vars(block) for block in blocks), "the blocks run themselves again"


def test_blocks_may_return_tuples():
    class Doubles(nn.Module):
        def forward(self, hidden, as_tuple):
            return (2 * hidden, "cache") if as_tuple else 2 * hidden

    for as_tuple in (False, True):
        inputs = BlockInputs([torch.ones(2, 3), torch.zeros(2, 3)], [[Arguments(kwargs={"as_tuple": as_tuple})]], 2)
        inputs.advance(Doubles())
        assert [h.shape for h in inputs.hidden] == [(2, 3), (2, 3)]
        assert torch.equal(inputs.hidden[0], torch.full((2, 3), 2.0))


def test_all_experts_share_a_pass_as_far_as_memory_allows(tiny_moe, tokens, monkeypatch):
    """Gate and up read one tensor, so they share a Hessian, unless one of them quantizes its input."""
    model = tiny_moe("mixtral")
    prepare(model, QuantScheme(4, 16))
    block = model.model.layers[0]
    block.mlp.experts[1].up_proj.scheme = QuantScheme(4, 16, act_bits=8)
    layers, inputs = layers_of(block), BlockInputs.capture(model, [block], tokens)
    passes = passes_of(block, inputs, layers)
    expert = "mlp.experts.{}.{}_proj".format
    assert passes[:2] == [[["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]], [["self_attn.o_proj"]]]
    assert passes[2][:3] == [[expert(0, "gate"), expert(0, "up")], [expert(1, "gate")], [expert(1, "up")]]
    assert passes[3] == [[expert(e, "down")] for e in range(6)]
    assert sorted(name for stages in passes for names in stages for name in names) == sorted(layers)
    monkeypatch.setattr("llmqat.algorithms.blocks.HESSIAN_BYTES", 2 * 4 * 96**2)
    assert [len(stages) for stages in passes_of(block, inputs, layers)] == [1, 1, 4, 3, 2, 2, 2]


def test_hessian_of_an_expert_is_that_of_its_tokens(tiny_moe, tokens):
    model = tiny_moe("mixtral")
    prepare(model, QuantScheme(4, 16))
    block, seen = model.model.layers[0], []
    inputs, layer = BlockInputs.capture(model, [block], tokens), block.mlp.experts[2].down_proj
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    for batch in range(len(tokens)):
        inputs.run(block, batch)
    handle.remove()
    x = torch.cat(seen).double()
    found = hessians_of(block, inputs, {f"mlp.experts.{e}.down_proj": block.mlp.experts[e].down_proj for e in range(6)})
    H, count, enough = found["mlp.experts.2.down_proj"]
    assert count == len(x) < 192
    assert enough == (count >= 2 * 96)
    assert torch.allclose(H.double(), 2 / count * x.T @ x, rtol=1e-4, atol=1e-5)
    assert sum(statistics.tokens for statistics in found.values()) == 2 * 192


@pytest.mark.parametrize("columns", [3, 200, 1601])
def test_half_of_a_hessian_is_summed(columns):
    x, H = torch.randn(7, columns), torch.zeros(columns, columns)
    for half in x.split(4):
        _add_square(H, half)
    assert torch.equal(_mirrored(H), H.T)
    torch.testing.assert_close(H, 2 * x.T @ x)


def test_hessians_are_those_of_float32(tiny_llama, tokens):
    model, _ = prepared(tiny_llama())
    block = model.model.layers[0]
    inputs, layers = BlockInputs.capture(model, [block], tokens), layers_of(block)
    expected = hessians_of(block, inputs, layers)
    with narrow_products():
        found = hessians_of(block, inputs, layers)
    assert all(torch.equal(found[name].H, expected[name].H) for name in layers)
