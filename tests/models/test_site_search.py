"""Sites of SmoothQuant found by trying: those that the rows of known families have, and no others."""

import copy

import pytest
import torch

from llmqat.models.architectures import ARCHITECTURES
from llmqat.models.patcher import smooth
from llmqat.models.site_search import find_sites

IDS = torch.arange(3, 15)[None]


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3", "opt", "gpt2"])
def test_the_sites_of_a_known_family_are_found(family, tiny):
    model = tiny(family)
    before = copy.deepcopy(model.state_dict())
    row = {(site.source, site.readers, site.offset) for site in ARCHITECTURES[family].smooth_sites}
    found = find_sites(model, IDS)
    assert len(found) == 2
    for sites in found:
        assert {(site.source, site.readers, site.offset) for site in sites} == row
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_experts_are_left_alone(tiny_moe, monkeypatch, capsys):
    """A norm that they read is no site, for what they are given is not what it returned."""
    monkeypatch.delitem(ARCHITECTURES, "qwen3_moe")
    model = tiny_moe("qwen3_moe")
    changes = smooth(model, [IDS])
    written = {name.removeprefix("model.layers.0.") for name in changes if name.startswith("model.layers.0.")}
    assert written == {"input_layernorm", "self_attn.v_proj"}
    assert "inputs of mlp.experts.0.gate_proj, " in capsys.readouterr().err


def test_weights_of_two_blocks_are_left_alone(tiny):
    """What is moved in one block would be missing in the other."""
    model = tiny("llama")
    first, second = (block.mlp for block in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    assert all("mlp.up_proj" not in {site.source for site in sites} for sites in find_sites(model, IDS))
