import pytest
import torch

from llmqat.config import Recipe, resolve
from llmqat.forecast.cost import Cost
from llmqat.forecast.stages import loading
from llmqat.models.loading import empty_model


@pytest.mark.parametrize(
    ("model_type", "values", "stored", "name", "held", "beside"),
    [
        ("llama", {}, torch.bfloat16, "loading", 2, 0),
        ("llama", {}, torch.float64, "loading", 4, 0),
        ("llama", {"init.smooth": 0.5}, torch.bfloat16, "SmoothQuant", 4, 30),
        ("unknown", {}, torch.bfloat16, "loading", 4, 0),
    ],
)
def test_a_model_is_loaded_as_it_is_stored_where_that_is_enough(
    tiny_llama, model_type, values, stored, name, held, beside
):
    model = empty_model(tiny_llama().config)
    model.config.model_type = model_type
    parameters = sum(parameter.numel() for parameter in model.parameters())
    found = loading(resolve(Recipe().with_values(values), parameters), model, stored, Cost(100.0, 5.0, 35.0))
    assert (found.name, found.bytes) == (name, held * parameters + beside)
    assert (found.flops > 0) == (name == "SmoothQuant")
