"""int8 activations of choice: those of `act_bits=8`, measured against the model as it was trained."""

import pytest
import torch

import llmqat
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Windows, evaluate
from llmqat.scheme import QuantScheme
from llmqat.serve.activations import AsTrained, serve_int8_activations

IDS = torch.arange(24).view(2, 12)


def packed(tiny_llama, directory, act_bits):
    model = tiny_llama()
    llmqat.prepare(model, QuantScheme(4, 32, act_bits=act_bits))
    llmqat.pack(model, directory)
    return directory


@pytest.fixture
def weight_only(tiny_llama, tmp_path):
    return packed(tiny_llama, tmp_path / "weight-only", None)


@torch.no_grad()
def test_they_are_those_of_act_bits(weight_only, tiny_llama, tmp_path):
    """The same weights packed with act_bits=8 give the same logits."""
    trained_so = llmqat.load(packed(tiny_llama, tmp_path / "a8", 8))
    chosen = llmqat.load(weight_only, activations="int8")
    assert torch.equal(chosen(IDS).logits, trained_so(IDS).logits)
    assert not torch.equal(chosen(IDS).logits, llmqat.load(weight_only)(IDS).logits)


@torch.no_grad()
def test_as_trained(weight_only):
    chosen, trained = llmqat.load(weight_only, activations="int8"), llmqat.load(weight_only)
    before = chosen(IDS).logits
    with AsTrained(chosen).active() as model:
        assert torch.equal(model(IDS).logits, trained(IDS).logits)
    assert torch.equal(chosen(IDS).logits, before)


def test_the_distance_is_measured(weight_only):
    chosen = llmqat.load(weight_only, torch.float32, activations="int8")
    ids = torch.randint(0, 100, (4, 32), generator=torch.Generator().manual_seed(0))
    data = Windows(ids, "none")
    assert evaluate(chosen, data, AsTrained(chosen)).kl_to_float > 0
    assert evaluate(llmqat.load(weight_only), data, AsTrained(llmqat.load(weight_only))).kl_to_float == 0


def test_only_where_there_is_a_choice(tiny_llama, tmp_path):
    directory = packed(tiny_llama, tmp_path / "a8", 8)
    with pytest.raises(LlmqatError, match="trained without: this model has none"):
        llmqat.load(directory, activations="int8")
    with pytest.raises(LlmqatError, match="this model has none"):
        serve_int8_activations(tiny_llama())
