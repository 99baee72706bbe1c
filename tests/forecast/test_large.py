"""A model that fits no test machine: the shape of Llama 3.1 8B, as bytes of every live tensor of a LoRA step."""

import pytest
import torch
from transformers import LlamaConfig

from llmqat.config import Recipe
from llmqat.forecast.cost import cost_of, training_step
from llmqat.models.loading import empty_model
from llmqat.models.planning import checked_plan, resolve_for

SHAPE = {
    **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
}

VALUES = {"train.gradient_checkpointing": True}


@pytest.mark.parametrize(("init", "lr_scale", "most"), [("gptq", None, 28.3e9), ("rtn", 0.0, 20.1e9)])
def test_lora_of_8b_with_checkpointing(init, lr_scale, most):
    """4 sequences of 512 tokens, by default; GPTQ adds a byte for each of 7 billion weights, and training the scales 20
    bytes for each of those."""
    model = empty_model(LlamaConfig(**SHAPE))
    recipe = resolve_for(model, Recipe().with_values({**VALUES, "init.method": init, "train.lr_scale": lr_scale}))
    assert (recipe.train.mode, recipe.quant.group_size) == ("lora", 128)
    coverage = checked_plan(model, recipe.scheme())
    assert cost_of(training_step, model, recipe, coverage, torch.bfloat16).peak < most
