"""What the native path does not recognise of the libraries around it turns it off, with a line that says so."""

import re

import pytest
import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicSlidingWindowLayer

from llmqat.compat import caches
from llmqat.compat.caches import cache_name, generate_cache_name
from llmqat.compat.native import why_not_recognised
from llmqat.errors import LlmqatError
from llmqat.serve.attach import attach
from llmqat.serve.paths import native_path
from tests.compat.helpers import move
from tests.serve.helpers import generate, packed_model


def rename_caches(monkeypatch):
    monkeypatch.setattr(caches, "CACHE_NAMES", ("memory",))
    cache_name.cache_clear()


def close_the_door(monkeypatch):
    monkeypatch.setattr(GenerationMixin, "generate", lambda self: None)


def lose_a_flag(monkeypatch):
    monkeypatch.setattr(DynamicSlidingWindowLayer, "is_sliding", property(lambda self: self.gone), raising=False)


UNKNOWN = {
    "cache": (rename_caches, r"transformers \S+ names its cache neither memory"),
    "loop": (close_the_door, r"generate of transformers \S+ takes no custom_generate"),
    "layer": (lose_a_flag, r"transformers \S+ has no DynamicSlidingWindowLayer\.is_sliding"),
    "name": (lambda patch: move(patch, "torch.nn.Module._modules"), r"torch \S+ has no nn\.Module\._modules"),
}


@pytest.fixture(autouse=True)
def _known_names():
    yield
    cache_name.cache_clear()


def test_the_installed_versions_are_recognised():
    assert why_not_recognised() == ""
    assert "reference" not in native_path()


@pytest.mark.parametrize(("change", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_what_is_not_recognised_is_said(change, message, monkeypatch):
    change(monkeypatch)
    assert re.match(message, why_not_recognised())
    assert native_path() == f"reference ({why_not_recognised()})"


def test_a_name_of_the_cache_that_nobody_knows(monkeypatch):
    rename_caches(monkeypatch)
    with pytest.raises(LlmqatError, match="names its cache neither memory; install transformers>=5"):
        generate_cache_name()


@pytest.mark.parametrize("name", ["torch.nn.Module._forward_hooks", "transformers.utils.output_capturing"])
def test_models_then_run_through_transformers(name, monkeypatch, capsys):
    expected, model = generate(attach(packed_model("llama"), native=False)), packed_model("llama")
    move(monkeypatch, name)
    attach(model)
    assert "forward" not in vars(model.model)
    assert "packed models run through the code of transformers, not natively: " in capsys.readouterr().err
    assert torch.equal(generate(model), expected)
