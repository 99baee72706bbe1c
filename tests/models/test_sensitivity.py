import copy
import re

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import Windows, evaluate
from llmqat.models.float_view import FloatCopy
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.models.sensitivity import Sensitivity, choose_bits, patterns
from llmqat.scheme import QuantScheme

SCHEME = QuantScheme(4, 16)
TEXT = torch.randint(0, 128, (8, 48), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def sharp(tiny_llama):
    """A model whose predictions are sharp, as those of trained ones are."""
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 5
    return model


def test_the_loss_is_the_kl_that_is_measured(sharp):
    """Layer by layer, with only that one on the grid: within a third, at 4 bits."""
    names = [name for name, module in sharp.named_modules() if re.search("_proj$", name)]
    modules = dict(sharp.named_modules())
    found = Sensitivity(sharp, {name: modules[name] for name in names}, [SCHEME])
    generator = torch.Generator().manual_seed(0)
    for row in TEXT.repeat(4, 1).split(8):
        found.add(row, generator)
    reference = FloatCopy(copy.deepcopy(sharp))
    for name in names[:7]:
        model = copy.deepcopy(sharp)
        others = "|".join(re.escape(other) for other in names if other != name)
        prepare(model, SCHEME, overrides={f"^({others})$": "float"}, min_coverage=0.0)
        kl = evaluate(model, Windows(TEXT, "none"), reference).kl_to_float
        assert found.losses[name][4] / found.tokens == pytest.approx(kl, rel=0.35), name


def test_layers_that_read_one_tensor_get_the_same_bits(sharp):
    found = choose_bits(sharp, SCHEME, [TEXT], 5.0)
    prepare(sharp, SCHEME, overrides=found)
    layers = {layer.name: layer.layer.scheme for layer in quantized_layers(sharp)}
    bits = {name: scheme.bits for name, scheme in layers.items()}
    assert set(bits.values()) == {4, 8}
    for name in bits:
        assert bits[name] == bits[re.sub("[kv]_proj", "q_proj", name).replace("up_proj", "gate_proj")]
    weights = {layer.name: layer.layer.weight.numel() for layer in quantized_layers(sharp)}
    average = sum(bits[name] * weights[name] for name in bits) / sum(weights.values())
    assert 4.5 < average <= 5.0
    assert all(scheme.group_size == 16 for scheme in layers.values())


def test_it_leaves_no_trace_and_repeats(sharp):
    before = copy.deepcopy(sharp.state_dict())
    first = choose_bits(sharp, SCHEME, [TEXT], 3.5)
    assert {change["bits"] for change in first.values()} <= {3, 8}  # 4 is the scheme's
    assert choose_bits(sharp, SCHEME, [TEXT], 3.5) == first
    assert all(parameter.grad is None for parameter in sharp.parameters())
    assert all(not module._forward_hooks for module in sharp.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in sharp.state_dict().items())


def test_layers_of_an_override_keep_it_and_are_not_counted(sharp):
    overrides = {"down_proj$": {"bits": 2}, "o_proj$": "float"}
    found = choose_bits(sharp, SCHEME, [TEXT], 8.0, overrides=overrides)
    prepare(sharp, SCHEME, overrides={**found, **overrides}, min_coverage=0.0)
    bits = {layer.name.rpartition(".")[2]: layer.layer.scheme.bits for layer in quantized_layers(sharp)}
    assert bits == {"q_proj": 8, "k_proj": 8, "v_proj": 8, "gate_proj": 8, "up_proj": 8, "down_proj": 2}


def test_patterns_name_exactly_their_layers():
    names = ["model.layers.1.mlp.up_proj", "model.layers.12.mlp.up_proj", "model.layers.1.mlp.down_proj", "proj"]
    found = patterns(names)
    assert len(found) == 3
    others = ["model.layers.2.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.1.mlp.up_proj.x", "a.proj"]
    for name in names + others:
        assert sum(re.search(pattern, name) is not None for pattern in found) == (name in names)


@pytest.mark.parametrize("average", [1.9, 8.5])
def test_averages_that_cannot_be_had_are_refused(sharp, average):
    with pytest.raises(LlmqatError, match="average must lie between 2 and 8 bits per weight"):
        choose_bits(sharp, SCHEME, [TEXT], average)


def test_models_of_one_grid_are_refused(tiny_moe):
    with pytest.raises(LlmqatError, match="bits cannot be chosen by layer for MixtralForCausalLM"):
        choose_bits(tiny_moe("mixtral"), SCHEME, [TEXT], 4.5)


@pytest.mark.parametrize("family", ["bert", "gemma3_text", "phi3"])
def test_other_families(tiny, family):
    """A classifier has no token to predict; Gemma scales its embeddings, and Phi has one layer for q, k and v."""
    found = choose_bits(tiny(family), SCHEME, [TEXT[:, :24] % 100], 5.0)
    assert {change["bits"] for change in found.values()} == {8}


def test_overrides_that_leave_nothing_to_choose_are_refused(sharp):
    with pytest.raises(LlmqatError, match="overrides give all layers their bits, and leave none to choose"):
        choose_bits(sharp, SCHEME, [TEXT], 4.5, overrides={"_proj$": {"bits": 8}})
