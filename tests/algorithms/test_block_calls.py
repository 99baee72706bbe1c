"""Blocks that return a tensor or a tuple, that hand things on to the next, and whose arguments depend on the batch."""

import pytest
import torch
from torch import nn

from llmqat.algorithms.block_calls import Arguments, sharing
from llmqat.algorithms.blocks import BlockInputs
from llmqat.errors import LlmqatError

BATCHES = list(torch.arange(24).view(3, 2, 4))


class Block(nn.Module):
    """Returns its output alone."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, hidden_states, ids, carried=None):
        return self.linear(hidden_states).tanh() + ids[..., None] / 10 + (0 if carried is None else carried)


class Pair(Block):
    def forward(self, hidden_states, ids, carried=None):
        output = super().forward(hidden_states, ids, carried)
        return output, output.sum(-1, keepdim=True)


class Model(nn.Module):
    """Embeds tokens, and hands them to its blocks, which also get the token ids."""

    def __init__(self, kind):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(32, 8), nn.ModuleList(kind() for _ in range(3))

    def forward(self, input_ids, use_cache):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = self.step(block, hidden, input_ids)
        return hidden

    def step(self, block, hidden, ids):
        return block(hidden, ids)


class ByName(Model):
    def step(self, block, hidden, ids):
        return block(ids=ids, hidden_states=hidden)


class FirstItem(Model):
    def step(self, block, hidden, ids):
        outputs = block(hidden, ids)
        return outputs[0]


class HandsOn(Model):
    carried = None

    def forward(self, input_ids, use_cache):
        self.carried = None
        return super().forward(input_ids, use_cache)

    def step(self, block, hidden, ids):
        hidden, self.carried = block(hidden, ids, carried=self.carried)
        return hidden


class Keeps(Model):
    """Blocks write into a dict that later ones read."""

    def forward(self, input_ids, use_cache):
        self.kept = {}
        return super().forward(input_ids, use_cache)

    def step(self, block, hidden, ids):
        return block(hidden, ids, self.kept)


class Writes(Block):
    def forward(self, hidden_states, ids, kept):
        kept[id(self)] = hidden_states
        return super().forward(hidden_states, ids, sum(kept.values()))


class Doubles(Model):
    def step(self, block, hidden, ids):
        return 2 * block(hidden, ids)


@pytest.mark.parametrize(
    ("kind", "block"), [(Model, Block), (ByName, Block), (FirstItem, Pair), (HandsOn, Pair), (Keeps, Writes)]
)
def test_a_walk_is_the_forward(kind, block):
    model = kind(block).eval()
    with torch.no_grad():
        expected = [model(ids, use_cache=False) for ids in BATCHES]
        inputs = BlockInputs.capture(model, list(model.blocks), BATCHES)
        for own in model.blocks:
            inputs.run(own, 2)  # passes over the data leave no trace
            inputs.advance(own)
    assert all(torch.equal(hidden, e) for hidden, e in zip(inputs.hidden, expected, strict=True))


def test_arguments_that_batches_share_are_kept_once():
    model = Model(Block)
    inputs = BlockInputs.capture(model, list(model.blocks), [BATCHES[0]] * 3)
    assert len(inputs.arguments) == 1
    assert len(BlockInputs.capture(model, list(model.blocks), BATCHES).arguments) == 3


def test_a_tuple_that_one_batch_alone_has_is_its_own():
    x = torch.ones(2)
    calls = [Arguments(args=(value,)) for value in ((x, None), (x.clone(), x), None)]
    assert sharing(calls[0], calls[2]).args == calls[0].args
    assert sharing(calls[2], calls[0]).args == (None,)
    first, second = sharing(calls[1], calls[0]).args[0]
    assert first is x
    assert second is x


def test_blocks_that_are_not_given_what_the_one_before_returned():
    model = Doubles(Block)
    with pytest.raises(
        LlmqatError, match=r"what block 0 of Doubles returns does not reach block 1 as it is .* GPTQ cannot"
    ):
        BlockInputs.capture(model, list(model.blocks), BATCHES)
