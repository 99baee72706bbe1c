"""GPTQ that is cut short goes on from the blocks it finished, to the same bits."""

import pytest
import torch

from llmqat.algorithms import gptq_model as driver
from llmqat.algorithms.gptq_model import GptqSettings, gptq_model
from llmqat.models.patcher import prepare, quantized_layers
from llmqat.scheme import QuantScheme
from llmqat.train.checkpoint import Checkpoints, SavedBlocks


@pytest.mark.parametrize("symmetric", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("keep_float", [True, False])
@pytest.mark.parametrize("finished", [0, 1, 2, 3])
def test_resumed_from_any_part(tiny_llama, tokens, tmp_path, monkeypatch, keep_float, symmetric, finished):
    """Two blocks, and the head."""

    def run(saved=None, batches=tokens):
        model = tiny_llama()
        prepare(model, QuantScheme(3, 16, symmetric), storage_dtype=torch.bfloat16, lm_head_bits=4)
        settings = GptqSettings(0.01, keep_float)
        return model, gptq_model(model, model.model.layers, batches, settings, saved, model.lm_head)

    uncut, expected = run()
    assert len(expected) == 15
    seen, original = [], driver._quantize_layer

    def quantize_layer(layer, *args):
        seen.append(layer)
        if len(seen) > 7 * finished:  # layers of a block
            raise KeyboardInterrupt
        return original(layer, *args)

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_quantize_layer", quantize_layer)
        if finished < 3:
            with pytest.raises(KeyboardInterrupt):
                run(SavedBlocks(Checkpoints(tmp_path)))
        else:
            run(SavedBlocks(Checkpoints(tmp_path)))
    assert len(list(tmp_path.iterdir())) == finished
    assert [SavedBlocks(Checkpoints(tmp_path)).holds(count) for count in range(5)] == [n <= finished for n in range(5)]
    calls = []
    monkeypatch.setattr(driver, "_quantize_layer", lambda *args: calls.append(1) or original(*args))
    # Where all parts are saved nothing is calibrated, and no block runs.
    resumed, errors = run(SavedBlocks(Checkpoints(tmp_path)), tokens if finished < 3 else [])
    assert len(calls) == max(0, 15 - 7 * finished)
    assert errors == expected
    states = uncut.state_dict(), resumed.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_blocks_of_the_other_kind_are_not_taken(tiny_llama, tokens, tmp_path):
    for keep_float in (True, False):
        model = tiny_llama()
        prepare(model, QuantScheme(3, 16), storage_dtype=torch.bfloat16)
        gptq_model(
            model, model.model.layers, tokens, GptqSettings(0.01, keep_float), SavedBlocks(Checkpoints(tmp_path))
        )
        for _, layer, _ in quantized_layers(model):
            assert (layer.compensation is not None) == keep_float


def test_blocks_that_hold_the_change_in_another_form_are_found_again():
    class Older:
        def get(self, index):
            return {"state": {"q.compensation": torch.ones(1)}, "errors": [], "keep_float": True}

    assert driver.restored(torch.nn.Module(), 0, GptqSettings(keep_float=True), Older()) is None


def test_a_block_holds_what_gptq_changed(tiny_llama, tokens, tmp_path):
    model = tiny_llama()
    prepare(model, QuantScheme(3, 16), storage_dtype=torch.bfloat16)
    gptq_model(model, model.model.layers, tokens, GptqSettings(0.01, True), SavedBlocks(Checkpoints(tmp_path)))
    layers = [name.removeprefix("model.layers.1.") for name, _, _ in quantized_layers(model) if ".1." in name]
    state = SavedBlocks(Checkpoints(tmp_path)).get(1)["state"]
    changed = ("scale", "compensation_multiples", "compensation_step")
    assert state.keys() == {f"{layer}.{tensor}" for layer in layers for tensor in changed}
