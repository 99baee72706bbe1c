"""Layers whose place nothing else can take stay float, with the reason in the coverage."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from transformers import MambaConfig, MambaForCausalLM

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.models.planning import plan
from llmqat.models.replaceable import READ
from llmqat.scheme import QuantScheme

INT4 = QuantScheme(4, 16)
DOWN = "model.layers.0.mlp.down_proj"


def reasons(report):
    return {layer.name: layer.reason for layer in report.skipped if layer.name != "lm_head"}


def mamba():
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=1, state_size=16, time_step_rank=16)
    return MambaForCausalLM(config).eval()


def test_a_weight_that_its_parent_reads(tmp_path):
    """Mamba multiplies by dt_proj.weight itself: the packed model has to run, and to compute the same."""
    model, ids = mamba(), torch.arange(12)[None]
    report = prepare(model, INT4, min_coverage=0.8)
    assert reasons(report) == {"backbone.layers.0.mixer.dt_proj": READ}
    assert report.block_coverage < 1
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        got = load_packed(save_packed(model, tmp_path))(input_ids=ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


def test_without_weights_a_run_without_values_tells():
    """`inspect` says what a run will find."""
    assert reasons(plan(mamba().to("meta"), INT4)) == {"backbone.layers.0.mixer.dt_proj": READ}


@pytest.mark.parametrize("broken", ["llmqat.models.replaceable.fake_copy", "transformers.MambaForCausalLM.forward"])
def test_where_nothing_can_run_the_source_tells(broken, monkeypatch):
    model = mamba().to("meta")
    monkeypatch.setattr(broken, None)
    assert reasons(plan(model, INT4))["backbone.layers.0.mixer.dt_proj"] == READ


class ReadsWeight(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = inner.gate_proj, inner.up_proj, inner.down_proj

    def forward(self, x):
        layer = self.down_proj  # what the source of a module does not show
        return functional.linear(self.up_proj(x) * self.gate_proj(x), layer.weight)


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Spelled(nn.Linear):
    """Falcon's way to write it."""

    def forward(self, x):
        return x @ self.weight.T + (0 if self.bias is None else self.bias)


def test_another_way_to_write_a_linear_layer(tiny_llama):
    model = tiny_llama()
    model.get_submodule(DOWN).__class__ = Spelled
    assert not reasons(plan(model, INT4))


def with_mlp(model):
    model.model.layers[0].mlp = ReadsWeight(model.model.layers[0].mlp)


def with_class(model):
    model.get_submodule(DOWN).__class__ = Scaled


def with_parametrization(model):
    parametrizations.weight_norm(model.get_submodule(DOWN))


def with_hook(model):
    model.get_submodule(DOWN).register_forward_hook(lambda module, args, output: output + 1)


def with_forward(model):
    layer = model.get_submodule(DOWN)
    layer.forward = lambda x: nn.Linear.forward(layer, x) + 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_mlp, READ),
        (with_class, "a Scaled with a forward of its own"),
        (with_parametrization, "its weight is computed from other parameters"),
        (with_hook, "it has hooks, which would be lost"),
        (with_forward, "a Linear with a forward of its own"),
    ],
)
def test_what_more_than_a_linear_layer_is_kept_float(tiny_llama, change, reason):
    model, ids = tiny_llama(), torch.arange(12)[None]
    change(model)
    expected = model(input_ids=ids).logits
    assert reasons(plan(model, INT4)) == {DOWN: reason}
    assert torch.equal(model(input_ids=ids).logits, expected), "planning changes nothing"


def test_a_module_of_two_names(tiny_llama):
    model = tiny_llama()
    layers = model.model.layers
    layers[1].mlp.up_proj = layers[0].mlp.up_proj
    assert reasons(plan(model, INT4)) == {"model.layers.0.mlp.up_proj": "a module of several names"}


def test_a_weight_of_two_layers(tiny_llama):
    """Codes that GPTQ finds for one of them would be those of the other."""
    model = tiny_llama()
    first, second = (layer.mlp.up_proj for layer in model.model.layers)
    second.weight = first.weight
    names = [f"model.layers.{index}.mlp.up_proj" for index in range(2)]
    assert reasons(plan(model, INT4)) == dict.fromkeys(names, "another layer has the same weight")


def test_planning_leaves_modes_alone(tiny_llama):
    model = tiny_llama().train()
    model.model.norm.eval()
    before = [module.training for module in model.modules()]
    classes = [type(module) for module in model.modules()]
    plan(model, INT4)
    assert [module.training for module in model.modules()] == before
    assert [type(module) for module in model.modules()] == classes


def test_too_many_such_layers_are_refused(tiny_llama):
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            module.__class__ = Scaled
    with pytest.raises(LlmqatError, match=r"no linear layer to quantize|only 0\.0% of the parameters of the blocks"):
        prepare(model, INT4)
