import pytest
import torch

from llmqat.algorithms import gptq_model
from llmqat.algorithms.blocks import BlockInputs
from llmqat.config import Recipe, resolve
from llmqat.forecast.cost import Cost
from llmqat.forecast.stages import gptq, loading, reconstruction, sensitivity
from llmqat.kernels.training import SWITCH
from llmqat.metrics.live_bytes import LiveBytes
from llmqat.metrics.perplexity import BATCH_TOKENS
from llmqat.models.experts import experts_as_linears
from llmqat.models.loading import empty_model
from llmqat.models.patcher import prepare
from llmqat.models.planning import checked_plan
from llmqat.models.sensitivity import MEASURED_TOKENS, TOGETHER, choose_bits
from llmqat.scheme import QuantScheme


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


def test_reconstruction_takes_the_operations_that_were_predicted(tiny_llama, monkeypatch):
    values = {"init.method": "blockwise", "init.block_steps": 6, "init.samples": 64, "data.length": 24}
    scheme, model = QuantScheme(4, 32), tiny_llama()
    coverage, counter = checked_plan(model, scheme, {}, None, 0.9), LiveBytes()
    (stage,) = reconstruction(resolve(Recipe().with_values(values), 1, 32), model, coverage, Cost(1.0, 5.0, 35.0))

    def counted(function):
        def run(*args):
            with counter.counting():
                return function(*args)

        return run

    monkeypatch.setenv(SWITCH, "torch")  # what is counted is operators of torch
    monkeypatch.setattr(gptq_model, "reconstruct", counted(gptq_model.reconstruct))
    monkeypatch.setattr(BlockInputs, "advance", counted(BlockInputs.advance))
    prepare(model, scheme, init="blockwise", calibration=list(torch.randint(0, 128, (16, 4, 24))), block_steps=6)
    assert stage.flops == pytest.approx(counter.flops, rel=0.15)
    assert reconstruction(resolve(Recipe(), 1, 32), model, coverage, Cost(1.0, 5.0, 35.0)) == []


def test_gptq_of_experts_takes_the_operations_that_were_predicted(tiny_moe):
    """Each expert has a Hessian of its own tokens."""
    model, ids = tiny_moe("mixtral", num_hidden_layers=1), torch.randint(0, 128, (32, 48))
    recipe = resolve(Recipe().with_values({"init.samples": 32, "data.length": 48}), 1, 32)
    coverage, counter, forward = checked_plan(model, QuantScheme(4, 32), {}, None, 0.9), LiveBytes(), LiveBytes()
    with forward.counting(), torch.no_grad(), experts_as_linears(model):
        model(ids)
    of_batch = Cost(forward.flops * BATCH_TOKENS / ids.numel(), 5.0, 35.0)
    stage = gptq(recipe, model, coverage, of_batch)
    with counter.counting():
        prepare(model, QuantScheme(4, 32), init="gptq", calibration=[ids])
    assert stage.flops == pytest.approx(counter.flops, rel=0.15)


def test_sensitivity_takes_the_operations_that_were_predicted(tiny_llama):
    model, ids = tiny_llama(hidden_size=128, intermediate_size=256), torch.randint(0, 128, (32, 64))
    recipe = resolve(Recipe().with_values({"quant.average_bits": 3.5}), 1, 32)
    counter, forward = LiveBytes(list(model.parameters())), LiveBytes()
    with counter.counting():
        choose_bits(model, QuantScheme(4, 32), [ids], 3.5)
    with forward.counting(), torch.no_grad():
        model(ids)
    of_batch = Cost(forward.flops * BATCH_TOKENS / TOGETHER, 5.0, 35.0)
    coverage = checked_plan(model, QuantScheme(4, 32), {}, None, 0.9)
    stage = sensitivity(recipe, model, coverage, of_batch, torch.float32)
    assert stage.flops * TOGETHER / MEASURED_TOKENS == pytest.approx(counter.flops, rel=0.15)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert stage.bytes - weights == pytest.approx(counter.peak - weights, rel=0.15)
