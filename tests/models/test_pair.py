"""The earlier spelling of `load_float`, for one version."""

import copy
import pickle

import pytest
import torch
from transformers import LlamaForCausalLM

import llmqat
from llmqat.models.loading import storage_dtype_of


def test_it_is_the_model(model_dir):
    model = llmqat.load_float(str(model_dir), torch.float32)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert storage_dtype_of(model) == torch.bfloat16


def test_it_can_still_be_unpacked(model_dir):
    loaded = llmqat.load_float(str(model_dir), torch.float32)
    with pytest.warns(DeprecationWarning, match=r"write `model = llmqat\.load_float\(\.\.\.\)`"):
        model, stored = loaded
    assert model is loaded
    assert stored == torch.bfloat16
    with pytest.warns(DeprecationWarning, match="leave storage_dtype out of prepare"):
        assert loaded[0] is loaded


@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_copies_are_plain_models_that_remember(model_dir, again):
    model = llmqat.load_float(str(model_dir), torch.float32)
    other = again(model)
    assert type(other) is LlamaForCausalLM
    assert storage_dtype_of(other) == torch.bfloat16
    ids = torch.arange(8)[None]
    assert torch.equal(other(input_ids=ids).logits, model(input_ids=ids).logits)
