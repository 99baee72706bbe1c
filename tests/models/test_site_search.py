"""Sites of SmoothQuant found by trying: those that the rows of known families have, and no others."""

import copy

import pytest
import torch

from llmqat.algorithms.fold import TOLERANCE
from llmqat.models.architectures import ARCHITECTURES
from llmqat.models.experts import experts_as_linears
from llmqat.models.patcher import smooth
from llmqat.models.site_search import find_sites
from llmqat.models.smooth_sites import ATTENTION, EXPERT_UP, EXPERTS, MLP, UP, VALUE
from tests.families.tiny import tiny_model

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


def test_the_sites_of_experts_are_found(tiny_moe):
    """Those of the row, in a block with experts and in one without."""
    model = tiny_moe("qwen3_moe")
    with experts_as_linears(model):
        found = find_sites(model, IDS)
    expected = (ATTENTION, VALUE, EXPERTS, EXPERT_UP), (ATTENTION, VALUE, MLP, UP)
    for sites, row in zip(found, expected, strict=True):
        own = {(site.source, site.readers, site.routers) for site in sites}
        assert own == {(site.source, site.readers, site.routers) for site in row}


@pytest.mark.parametrize(
    ("kind", "around", "within"),
    [
        ("gpt_oss", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj"), False),  # what is up is cut off
        (
            "llama4_text",
            (
                *(f"feed_forward.experts.*.{name}_proj" for name in ("gate", "up")),
                *(f"feed_forward.shared_expert.{name}_proj" for name in ("gate", "up")),
            ),
            True,
        ),
    ],
)
def test_experts_of_families_without_a_row(kind, around, within, capsys):
    model = tiny_model(kind)
    changes = smooth(model, [IDS])
    said = capsys.readouterr().err
    assert f"post_attention_layernorm -> {' '.join(around)}" in said
    assert ("experts.*.up_proj -> " in said) == within
    assert ("inputs of mlp.experts.0.down_proj, " in said) != within
    assert max(site.change for site in changes.values()) <= TOLERANCE


def test_weights_of_two_blocks_are_left_alone(tiny):
    """What is moved in one block would be missing in the other."""
    model = tiny("llama")
    first, second = (block.mlp for block in model.model.layers)
    second.down_proj.weight = first.down_proj.weight
    assert all("mlp.up_proj" not in {site.source for site in sites} for sites in find_sites(model, IDS))
