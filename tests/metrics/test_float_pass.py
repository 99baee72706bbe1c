import numpy as np
import pytest
import torch

from llmqat.metrics import perplexity
from llmqat.metrics.float_pass import FloatPass
from llmqat.metrics.perplexity import Windows, evaluate
from llmqat.models.float_view import FloatCopy, FloatView
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.scheme import QuantScheme
from tests.narrow_products import narrow_products

TEXT = torch.randint(0, 128, (6, 48), generator=torch.Generator().manual_seed(2))
ANSWERS = torch.stack([TEXT, torch.where(torch.arange(48) % 7 < 3, TEXT, -100)], 1)
ANSWERS[:, 1, 40:] = -100


@pytest.fixture
def forwards(monkeypatch):
    """Makes models count their forwards: ``forwards(model)`` gives a list that grows."""

    def count(model):
        calls = []
        model.register_forward_hook(lambda *_: calls.append(1))
        return calls

    monkeypatch.setattr(perplexity, "BATCH_TOKENS", 96)  # three batches of two windows
    return count


@pytest.mark.parametrize("ids", [TEXT, ANSWERS], ids=["text", "conversations"])
@pytest.mark.parametrize("head_bits", [None, 4])
def test_rows_are_scored_as_beside_a_running_float_model(tiny_llama, forwards, ids, head_bits):
    model, data = tiny_llama(), Windows(ids, "none")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    counted = forwards(model)
    float_pass = FloatPass(FloatCopy(model), data, names)
    assert len(counted) == 3
    np.testing.assert_array_equal(float_pass.score("float").losses, evaluate(tiny_llama(), data).losses)
    prepare(model, QuantScheme(3, 16), lm_head_bits=head_bits)
    float_pass.reference = FloatView(model)
    watched = [on_grid.name for on_grid in quantized_layers(model)]
    expected = evaluate(model, data, FloatCopy(tiny_llama()), layers=watched)
    counted.clear()
    found = float_pass.compare(model, "rtn")
    assert len(counted) == 3  # its own: the float one ran before
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert (found.kl_to_float, found.top1_agreement) == (expected.kl_to_float, expected.top1_agreement)
    assert {name: found.layer_errors[name] for name in watched} == expected.layer_errors
    assert float_pass.compare(model, "packed", watch=False).layer_errors is None
    assert float_pass.compared_with() is model.lm_head


def test_nothing_of_the_size_of_the_vocabulary_is_kept(tiny_llama):
    model = tiny_llama(vocab_size=1000)
    kept = FloatPass(FloatCopy(model), Windows(TEXT, "none"), ["lm_head", "model.layers.0.mlp.up_proj"]).kept
    kept = list(kept.values())
    assert [entry.hidden.shape for entry in kept] == [(6, 48, 64)]
    assert kept[0].hidden.untyped_storage().nbytes() == 4 * 6 * 48 * 64
    assert [entry.outputs.keys() for entry in kept] == [{"model.layers.0.mlp.up_proj"}]
    assert sum(rows.numel() for entry in kept for rows in entry.outputs.values()) == 3 * 96


def test_a_model_whose_head_cannot_run_apart_runs_again(tiny_llama, forwards, monkeypatch):
    model, data = tiny_llama(), Windows(TEXT, "none")
    original = model.forward
    monkeypatch.setattr(model, "forward", lambda **inputs: doubled(original(**inputs)))
    float_pass = FloatPass(FloatCopy(model), data)
    assert not float_pass.kept
    counted = forwards(model)
    result = float_pass.compare(tiny_llama(), "row", watch=False)
    assert len(counted) == 4  # the first one twice, to find out
    assert result.kl_to_float == pytest.approx(evaluate(tiny_llama(), data, FloatCopy(model)).kl_to_float)
    assert result.kl_to_float > 0
    assert float_pass.compared_with() is model


def doubled(outputs):
    outputs["logits"] = outputs.logits * 2
    return outputs


def test_scores_are_those_of_float32(tiny_llama):
    model, data = tiny_llama(), Windows(TEXT, "none")
    expected = FloatPass(FloatCopy(model), data).compare(tiny_llama(), "again")
    with narrow_products():
        found = FloatPass(FloatCopy(model), data).compare(tiny_llama(), "again")
    np.testing.assert_array_equal(found.losses, expected.losses)
    assert found.kl_to_float == expected.kl_to_float
