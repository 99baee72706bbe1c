"""Targets of config groups: our own, those of other writers, and those that were made to hang a reader."""

import re
import time

import pytest

from llmqat.errors import LlmqatError
from llmqat.formats.targets import CONV1D, LINEAR, is_target, target_of

NAME = "model.layers.10.mlp.up_proj"
EXPERT = "model.layers.3.mlp.experts.17.gate_proj"


@pytest.mark.parametrize("target", [LINEAR, CONV1D, NAME])
def test_names_and_classes(target):
    assert is_target(target, NAME)
    assert is_target(target, NAME + "x") == (target != NAME)


@pytest.mark.parametrize("name", [NAME, EXPERT, "transformer.h.0.attn.c_attn", "a-b.experts.0.w1"])
def test_a_layer_is_what_its_own_target_means(name):
    assert is_target(target_of(name), name)
    assert not is_target(target_of(name), name + "2")


def test_experts_share_a_target():
    assert target_of(EXPERT) == r"re:model\.layers\.3\.mlp\.experts\.\d+\.gate_proj$"
    assert target_of(EXPERT) == target_of(EXPERT.replace("17", "4"))
    assert not is_target(target_of(EXPERT), EXPERT.replace("layers.3", "layers.4"))


PATTERNS = [".*", "", "$", "model", ".*up_proj", ".*up_proj$", "up_proj", ".*mlp.*", "^model.layers.1", r".*\d+\.mlp"]
PATTERNS += [r"model\.layers\.\d+\.mlp\..*", r".*layers\.\d+\.mlp$", r"model.*model", ".*p.*p.*p.*$", r".*\.$", ".*o"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("name", [NAME, EXPERT, "lm_head", "model.norm", ""])
def test_patterns_mean_what_they_mean_to_re(pattern, name):
    assert is_target(f"re:{pattern}", name) == (re.match(pattern, name) is not None)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+$", "(x|xx)*y", "(", "[a-z]*", "a{1,9}", "a*a*a*b", r"\d+\d+x", r"\w+", "a\\", r"\.*", r"\1", "a**", "x y"],
)
def test_other_patterns_are_refused(pattern):
    with pytest.raises(LlmqatError, match=r"cannot match the target 're:.*; name the layers instead") as caught:
        is_target(f"re:{pattern}", "a" * 40)
    assert len(str(caught.value)) < 400


def test_no_pattern_takes_long():
    """`re` would go back through the places of all these wildcards."""
    start = time.process_time()
    assert not is_target("re:" + ".*a" * 60 + ".*b$", "a" * 400)
    assert not is_target("re:" + r".*\d+\.x" * 30, "1" * 400 + ".")
    assert time.process_time() - start < 5
