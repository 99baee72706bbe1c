import pytest
from torch import nn

from llmqat.config import Recipe
from llmqat.errors import LlmqatError
from llmqat.models.planning import check_divisible, default_group_size, plan, resolve_for
from llmqat.scheme import QuantScheme


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group_size"),
    [(128, 256, 128), (128, 192, 64), (576, 1536, 64), (64, 96, 32), (128, 224, 32), (48, 96, 32)],
)
def test_the_default_group_size_divides_every_row(tiny, hidden, intermediate, group_size):
    model = tiny("llama", hidden_size=hidden, intermediate_size=intermediate, head_dim=hidden // 4)
    assert default_group_size(model) == group_size


def test_layers_with_a_group_size_of_their_own_do_not_choose_the_default(tiny):
    model = tiny("llama", hidden_size=128, intermediate_size=96, head_dim=32)
    assert default_group_size(model, {"down_proj$": "float"}) == 128
    assert default_group_size(model, {"down_proj$": {"group_size": -1}}) == 128
    assert default_group_size(model, {"down_proj$": {"bits": 8}}) == 32


def test_where_no_default_divides_the_plan_is_refused_by_name(tiny):
    model = tiny("llama", hidden_size=128, intermediate_size=80, head_dim=32)
    size = default_group_size(model)
    with pytest.raises(LlmqatError, match=r"group_size 32 does not divide 2 layers: .*down_proj \(in_features 80\)"):
        check_divisible(plan(model, QuantScheme(4, size)))


def test_rows_shorter_than_a_group_stay_float(tiny):
    """Gemma 3n has such layers beside the others; an override gives them a group for each row."""
    model = tiny("llama")
    model.model.layers[0].mlp.coefficients = nn.Linear(4, 8, bias=False)
    name = "model.layers.0.mlp.coefficients"
    report = plan(model, QuantScheme(4, 16))
    assert {layer.name: layer.reason for layer in report.skipped}[name] == "its rows are shorter than a group"
    assert f"{name}.weight" in report.uncovered
    assert default_group_size(model) == 32
    own = {"coefficients": {"group_size": -1}}
    assert name in {layer.name for layer in plan(model, QuantScheme(4, 16), own).quantized}


@pytest.mark.parametrize(
    ("model_type", "chosen"),
    [("gemma", "window"), ("gemma2", "window"), ("gemma3_text", "window"), ("llama", "stream")],
)
def test_families_that_do_badly_without_bos_have_it_in_every_sequence(tiny, model_type, chosen):
    model, recipe = tiny(model_type), Recipe()
    assert resolve_for(model, recipe).eval.bos == chosen
    assert resolve_for(model, recipe.with_values({"eval.bos": "none"})).eval.bos == "none"
