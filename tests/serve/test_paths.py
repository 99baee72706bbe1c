"""Which path ran is counted, and a benchmark on the wrong one is refused."""

from copy import deepcopy

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.metrics.throughput import throughput
from llmqat.serve.attach import attach
from llmqat.serve.paths import PathCounts, native_path, path_counts
from tests.serve.helpers import PROMPT, generate, packed_model


@torch.no_grad()
def test_calls_are_counted():
    model = attach(packed_model("llama", lm_head_bits=8))
    assert path_counts(model) == PathCounts(True)
    model(PROMPT)
    generate(model, max_new_tokens=5)
    counts = path_counts(model)
    assert (counts.loop_tokens, counts.native_calls, counts.reference_calls) == (4, 2, 0)
    assert counts.all_native
    assert counts.summary() == "native loop 4 tokens, native blocks 2 calls"
    model(PROMPT.repeat(2, 1))
    generate(model, num_beams=2, max_new_tokens=3)
    later = path_counts(model) - counts
    assert later.loop_tokens == later.native_calls == 0
    assert later.reference_calls == 4
    assert dict(later.reasons)["generate: num_beams"] == 1
    assert "a batch of 2 sequences" in later.summary()
    assert not later.all_native
    assert path_counts(deepcopy(model)).native_calls == 0


def test_a_model_without_a_native_path_says_why():
    model = attach(packed_model("gpt_neox", head_dim=None))
    counts = path_counts(model)
    assert counts.summary() == "reference path: the family gpt_neox has no native blocks"
    assert not counts.all_native
    assert not path_counts(attach(packed_model("llama"), native=False)).native


def test_this_machine(monkeypatch):
    assert "llama" in native_path()
    monkeypatch.setattr(native, "library", lambda: None)
    assert native_path().startswith("reference (")


def test_a_benchmark_on_the_wrong_path_is_refused():
    model = attach(packed_model("llama"))
    speed = throughput(model, prompt=8, new_tokens=4, repeats=2)
    assert speed.paths.all_native
    assert speed.paths.loop_tokens == 8
    model.model.layers[0].register_forward_hook(lambda *_: None)
    with pytest.raises(LlmqatError, match=r"throughput was measured on the wrong path .*hooks listen in"):
        throughput(model, prompt=8, new_tokens=4, repeats=2)
    plain = throughput(attach(packed_model("llama"), native=False), prompt=8, new_tokens=4, repeats=1)
    assert not plain.paths.native
