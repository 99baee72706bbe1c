import inspect

import pytest
import torch

from llmqat.compat.caches import cache_of
from llmqat.config import EvalConfig
from llmqat.errors import LlmqatError
from llmqat.metrics import throughput as module
from llmqat.metrics.throughput import Throughput, throughput, weight_bytes
from llmqat.models.patcher import convert, prepare
from llmqat.scheme import QuantScheme


def test_a_value_per_repetition(tiny_llama):
    speed = throughput(tiny_llama(), prompt=8, new_tokens=4, repeats=3)
    assert len(speed.prefill) == len(speed.decode) == 3
    assert min(*speed.prefill, *speed.decode, speed.weight_gb_s) > 0
    assert (speed.prompt, speed.new_tokens) == (8, 4)


def test_what_is_timed(tiny_llama, monkeypatch):
    """One prefill of the prompt; again for `generate`, then one token at a time on its cache."""
    model, lengths = tiny_llama(), []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(
            (
                kwargs["input_ids"].shape[1],
                cache_of(kwargs).get_seq_length() if cache_of(kwargs) else 0,
            )
        ),
        with_kwargs=True,
    )
    throughput(model, prompt=8, new_tokens=3, repeats=1)
    once = [(8, 0), (8, 0), (1, 8), (1, 9), (1, 10)]
    assert lengths == once + once  # warm-up, measurement


def test_numbers(monkeypatch, tiny_llama):
    seconds = iter([(9.0, 9.0), (2.0, 1.0), (1.0, 0.5), (4.0, 2.0)])  # the first is the warm-up
    monkeypatch.setattr(module, "_once", lambda *_: next(seconds))
    model = tiny_llama()
    speed = throughput(model, prompt=8, new_tokens=4, repeats=3)
    assert speed.prefill == (4.0, 8.0, 2.0)
    assert (speed.prefill_tok_s, speed.decode_tok_s) == (4.0, 4.0)
    assert speed.weight_gb_s == weight_bytes(model) * 4.0 / 1e9
    assert speed.spread(speed.prefill) == "4 [2, 8]"


def test_context(tiny_llama):
    throughput(tiny_llama(), prompt=60, new_tokens=4, repeats=1)
    message = "61 prompt and 4 new tokens exceed the model's context of 64; lower --prompt-tokens or --new-tokens"
    with pytest.raises(LlmqatError, match=message):
        throughput(tiny_llama(), prompt=61, new_tokens=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_weight_bytes_of_a_float_model(tiny_llama, tied, dtype):
    model = tiny_llama(tie_word_embeddings=tied).to(dtype)
    embedding = model.model.embed_tokens.weight.numel()
    total = sum(p.numel() for p in model.parameters())
    # The head reads the whole table, the embedding one row of it: counted once either way.
    assert weight_bytes(model) == (total if tied else total - embedding) * dtype.itemsize


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("group_size", [32, -1])
def test_weight_bytes_of_a_packed_model(tiny_llama, tied, group_size):
    model = tiny_llama(tie_word_embeddings=tied)
    linear = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    rows = sum(
        m.weight.numel() // (32 if group_size == 32 else m.in_features)
        for m in model.model.modules()
        if isinstance(m, torch.nn.Linear)
    )
    rest = sum(p.numel() for p in model.parameters()) - linear
    embedding = 0 if tied else model.model.embed_tokens.weight.numel()
    prepare(model, QuantScheme(4, group_size), storage_dtype=torch.bfloat16)
    convert(model)
    assert weight_bytes(model) == linear // 2 + rows * 2 + (rest - embedding) * 4


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_weight_bytes_count_two_experts_of_six(tiny_moe, family):
    """Float or packed, a token reads only the experts it is routed to."""
    model = tiny_moe(family)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    rest = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel() - experts
    assert weight_bytes(model) == (rest + experts // 3) * 4
    attention = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
    prepare(model, QuantScheme(4, 16), storage_dtype=torch.bfloat16)
    convert(model)
    assert weight_bytes(model) == (rest - attention) * 4 + (attention + experts // 3) * (4 + 16 // 16) // 8


def test_bandwidth_counts_decoding():
    assert Throughput((1.0,), (50.0,), 8, 4, 2_000_000_000).weight_gb_s == 100.0


def test_one_home_of_the_defaults():
    """A recipe, `llmqat eval` and a notebook measure speed alike."""
    defaults = {name: p.default for name, p in inspect.signature(throughput).parameters.items() if name != "model"}
    assert defaults == {name: getattr(EvalConfig, name) for name in ("prompt", "new_tokens", "repeats")}
