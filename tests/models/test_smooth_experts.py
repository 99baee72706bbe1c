"""Smoothing up -> down inside experts: each on its own, by its own tokens, while the model stays a fused one."""

import copy
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmqat.algorithms.fold import TOLERANCE
from llmqat.algorithms.smoothquant import LEAST_EXPERT_TOKENS, smoothing_scale, smoothing_summary
from llmqat.errors import LlmqatError
from llmqat.models import smooth_sites
from llmqat.models.architectures import ARCHITECTURES
from llmqat.models.experts import experts_as_linears, split_experts
from llmqat.models.patcher import prepare, smooth
from llmqat.models.smooth_sites import EXPERT_UP, EXPERTS, Site, folds_of
from llmqat.nn.expert_layout import is_fused
from llmqat.scheme import QuantScheme

FAMILIES = ("mixtral", "qwen3_moe")
W8A8, W4A8 = QuantScheme(8, -1, act_bits=8), QuantScheme(4, 16, act_bits=8)

pytestmark = pytest.mark.parametrize("family", FAMILIES)


def fused_of(model):
    """Name of the first block's experts, and the module."""
    return next((name, module) for name, module in model.named_modules() if is_fused(module))


@torch.no_grad()
def inject(model, factor=512.0):
    """Expert e has outliers in the channels e and e + 20: no scale for all experts would fit."""
    for module in [module for module in model.modules() if is_fused(module)]:
        intermediate = module.down_proj.shape[-1]
        for expert in range(len(module.down_proj)):
            for channel in (expert, expert + 20):
                module.gate_up_proj[expert, intermediate + channel] *= factor
                module.down_proj[expert, :, channel] /= factor
    return model


@pytest.fixture
def tokens():
    """Enough for every expert."""
    return list(torch.randint(0, 128, (4, 4, 24)))


@torch.no_grad()
def logits(model, tokens):
    return torch.cat([model(input_ids=batch).logits for batch in tokens])


@pytest.fixture
def only_experts(monkeypatch, family):
    """A table in which up -> down of experts is the only site."""
    monkeypatch.setitem(ARCHITECTURES, family, sites(family, EXPERT_UP))


def sites(family, *own):
    return replace(ARCHITECTURES[family], smooth_sites=own)


@pytest.mark.parametrize("alpha", [0.5, "auto"])
@pytest.mark.parametrize("scheme", [W8A8, W4A8], ids=str)
def test_brings_back_what_outliers_inside_experts_destroy(family, scheme, alpha, tiny_moe, tokens, only_experts):
    """In the output of a block's experts: a router behind it would tip over with the first of them."""
    plain, seen = tiny_moe(family), []
    name, fused = fused_of(plain)
    handle = fused.register_forward_pre_hook(lambda _, args: seen.append(args))
    logits(plain, tokens)
    handle.remove()
    with torch.no_grad():
        expected = fused(*seen[0])

    @torch.no_grad()
    def error(model):
        prepare(model, scheme)
        return float((model.get_submodule(name)(*seen[0]) - expected).norm() / expected.norm())

    smoothed = inject(tiny_moe(family))
    done = smooth(smoothed, tokens, alpha, scheme=scheme)
    assert all(site.alpha is not None for site in done.values()), done
    clean, collapsed, rescued = error(plain), error(inject(tiny_moe(family))), error(smoothed)
    assert collapsed > 4 * clean
    assert rescued < 1.1 * clean


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_expert_is_scaled_by_its_own_tokens_and_by_powers_of_two(family, dtype, tiny_moe, tokens, only_experts):
    model = tiny_moe(family, dtype)
    before = copy.deepcopy(model)
    done = smooth(model, tokens, 0.5)
    torch.testing.assert_close(
        logits(model, tokens), expected := logits(before, tokens), rtol=0, atol=TOLERANCE * expected.abs().max().item()
    )
    split_experts(before)
    name, fused = fused_of(model)
    split, seen = before.get_submodule(name), [[] for _ in fused.down_proj]
    for expert, x in zip(split, seen, strict=True):
        expert.down_proj.register_forward_pre_hook(lambda _, args, x=x: x.append(args[0]))
    logits(before, tokens)
    half = fused.down_proj.shape[-1]
    for e, (expert, x) in enumerate(zip(split, seen, strict=True)):
        assert sum(len(part) for part in x) >= LEAST_EXPERT_TOKENS
        s = smoothing_scale(torch.cat(x).abs().amax(0), expert.down_proj.weight.abs().amax(0), 0.5).to(dtype)
        assert (torch.frexp(s).mantissa == 0.5).all()
        assert torch.equal(fused.gate_up_proj[e, :half], expert.gate_proj.weight), "never the gate"
        assert torch.equal(fused.gate_up_proj[e, half:], expert.up_proj.weight / s[:, None])
        assert torch.equal(fused.down_proj[e], expert.down_proj.weight * s)
        assert done[f"{name}.{e}.up_proj"].alpha == 0.5


@pytest.mark.parametrize("alpha", [0.5, "auto"])
def test_experts_that_tokens_hardly_reach_stay_as_they_are(family, alpha, tiny_moe, tokens, only_experts):
    """Expert 4 sees no token, expert 2 fewer than it takes."""
    model = inject(tiny_moe(family))
    name, fused = fused_of(model)
    few = torch.zeros(tokens[0].numel(), dtype=torch.long)
    few[: (LEAST_EXPERT_TOKENS - 1) // len(tokens)] = 1

    def route(_, args, out):
        index = torch.stack([torch.zeros_like(few), 1 + few], 1)
        return out[0], out[1], index[: len(out[2])]

    model.get_submodule(name.replace("experts", "gate")).register_forward_hook(route)
    before = copy.deepcopy(fused)
    done = smooth(model, tokens, alpha, scheme=W8A8)
    for e in range(len(fused.down_proj)):
        untouched = e >= 2
        assert torch.equal(fused.gate_up_proj[e], before.gate_up_proj[e]) == untouched
        assert torch.equal(fused.down_proj[e], before.down_proj[e]) == untouched
        assert (done[f"{name}.{e}.up_proj"].alpha is None) == untouched
    few = f"fewer than {LEAST_EXPERT_TOKENS} calibration tokens"
    bare = f"left as they are, for {few}: {name}.2.up_proj, {name}.3.up_proj, "
    assert bare in smoothing_summary(done)


def test_experts_that_stay_float_are_off(family, tiny_moe, tokens, only_experts):
    """A search by the schemes of `prepare`, whose overrides name experts one by one."""
    model = inject(tiny_moe(family))
    before = copy.deepcopy(model.state_dict())
    done = smooth(model, tokens, "auto", scheme=W8A8, overrides={r"mlp\.experts\.\d+\.": "float"})
    assert {(site.alpha, site.errors) for site in done.values()} == {(None, (0.0, 0.0))}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_search_leaves_experts_alone_where_nothing_helps(family, tiny_moe, tokens, only_experts):
    """Without outliers most of them: unchanged, and said to be off."""
    model = tiny_moe(family)
    before = copy.deepcopy(model)
    done = smooth(model, tokens, "auto", scheme=W8A8)
    split_experts(model)
    split_experts(before)
    off = {name for name, site in done.items() if site.alpha is None}
    for name, site in done.items():
        same = torch.equal(model.get_submodule(name).weight, before.get_submodule(name).weight)
        assert same == (name in off) == (site.errors[0] == site.errors[1])
    assert 0 < len(off) < len(done), [site.alpha for site in done.values()]


def test_what_all_experts_read_is_observed_at_the_router(family, tiny_moe, tokens):
    """Which sees every token."""
    name, fused = fused_of(model := tiny_moe(family))
    block = model.get_submodule(name.removesuffix(".mlp.experts"))
    with experts_as_linears(model):
        (fold,) = folds_of(block, "", (EXPERTS,), model.config, lambda _: W8A8)
    assert fold.observed is block.mlp.gate
    assert len(fold.read) == 2 * len(fused.down_proj) + 1


def test_the_model_stays_fused_and_can_be_saved(family, tiny_moe, tokens, tmp_path):
    model = inject(tiny_moe(family))
    parameters = dict(model.named_parameters())
    smooth(model, tokens, 0.5)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert len(list(model.parameters())) == len(parameters)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


def test_a_wrong_site_is_named_once_and_put_back(family, tiny_moe, tokens, monkeypatch):
    model = tiny_moe(family)
    before = copy.deepcopy(model.state_dict())
    wrong = Site("mlp.experts.*.gate_proj", EXPERT_UP.readers, only_with="mlp.experts")
    monkeypatch.setitem(ARCHITECTURES, family, sites(family, *smooth_sites.MOE[1:2], wrong))
    with pytest.raises(LlmqatError, match=r"smoothing model\.layers\.0\.mlp\.experts\.\*\.gate_proj changed the float"):
        smooth(model, tokens, 0.5)
    assert list(model.state_dict()) == list(before), "the fused modules are back"
    experts = {name: value for name, value in model.state_dict().items() if "experts" in name}
    assert all(torch.equal(value, before[name]) for name, value in experts.items())
