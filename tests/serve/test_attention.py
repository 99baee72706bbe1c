"""Attention of the native decoder over more tokens than it takes at a time."""

import pytest
import torch
from transformers import DynamicCache

from tests.serve.helpers import both, packed_model

LONG = {
    "plain": {"head_dim": 32},
    "wide heads": {"head_dim": 80},
    "one key head": {"head_dim": 336, "num_key_value_heads": 1, "num_attention_heads": 2},
    "window": {"head_dim": 64, "sliding_window": 100},
}


@pytest.mark.parametrize("options", LONG.values(), ids=LONG)
def test_long_prompts(options, isa, calls):
    """In several pieces, each of which sees those before it."""
    model = packed_model("mistral", dtype=torch.bfloat16, **options)
    prompt = torch.randint(0, 128, (1, 450))

    def run():
        cache = DynamicCache(config=model.config)
        return [model(ids, past_key_values=cache).logits.double() for ids in prompt.split([257, 33, 160], 1)]

    with torch.no_grad():
        expected, logits = both(model, run)
        model.double()
        exact = run()
    assert calls == [257, 33, 160]
    for ours, theirs, right in zip(logits, expected, exact, strict=True):
        assert (ours - right).norm() <= 1.5 * (theirs - right).norm()
        assert ((ours - right).norm(dim=-1) <= 4 * (theirs - right).norm(dim=-1)).all()
