"""Calibration of blocks that do not run one after the other: all calls count, on blocks that are already quantized."""

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput

from llmqat.algorithms.blocks import hessians_of, layers_of, passes_of
from llmqat.algorithms.gptq_model import GptqSettings, gptq_block
from llmqat.algorithms.whole_runs import WholeRuns
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.scheme import QuantScheme

BATCHES = list(torch.arange(24).view(2, 3, 4))


class Loop(nn.Module):
    """Runs two linears three times."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(32, 8)
        self.blocks = nn.ModuleList(
            nn.Sequential(FakeQuantLinear.from_linear(nn.Linear(8, 8), QuantScheme(4, 8), torch.float32))
            for _ in range(2)
        )
        self.read = []

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for _ in range(3):
            for block in self.blocks:
                self.read.append((block, hidden))
                hidden = 2 * block(hidden).tanh()
        return ModelOutput(logits=hidden)


def test_a_hessian_is_that_of_all_calls():
    model = Loop()
    inputs = WholeRuns.of(model, BATCHES)
    found = hessians_of(model.blocks[0], inputs, layers_of(model.blocks[0]))["0"]
    x = torch.cat([hidden.flatten(0, 1) for block, hidden in model.read if block is model.blocks[0]])
    assert found.tokens == len(x) == 3 * 24
    torch.testing.assert_close(found.H, 2 / len(x) * x.T @ x)


def test_layers_of_a_block_share_a_pass():
    model = Loop()
    both = nn.Sequential(*model.blocks)
    assert passes_of(both, WholeRuns.of(model, BATCHES), layers_of(both)) == [[["0.0"], ["1.0"]]]


def test_the_next_block_reads_what_the_quantized_one_writes():
    model = Loop()
    inputs = WholeRuns.of(model, BATCHES)
    before = hessians_of(model.blocks[1], inputs, layers_of(model.blocks[1]))["0"]
    gptq_block(model.blocks[0], inputs, GptqSettings())
    after = hessians_of(model.blocks[1], inputs, layers_of(model.blocks[1]))["0"]
    assert after.tokens == before.tokens
    assert not torch.equal(after.H, before.H)
