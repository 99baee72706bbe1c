"""Ranges of static activations while training: they follow, freeze, and belong to the best state."""

import pytest
import torch

from llmqat.algorithms.activation_ranges import static_layers
from llmqat.models.patcher import prepare
from llmqat.scheme import QuantScheme
from llmqat.train.loop import Trainer, TrainingData, fit
from llmqat.train.modes import select_trainable


@pytest.fixture
def run(tiny_llama, train_config, monkeypatch):
    """``run(**fields)``: train four steps; the model, the result, and the scales after every held-out loss."""

    def make(**fields):
        model = tiny_llama(num_hidden_layers=1)
        ids = torch.randint(0, 128, (20, 16), generator=torch.Generator().manual_seed(1))
        scheme = QuantScheme(4, 32, act_bits=8, act_static=True)
        prepare(model, scheme, calibration=[ids[:2]], observer="moving_average")
        select_trainable(model, "full", False)
        seen = {}
        evaluate = Trainer.evaluate

        def recording(self):
            evaluate(self)
            seen[self.result.steps] = [float(layer.act_scale) for layer in static_layers(model)]

        monkeypatch.setattr(Trainer, "evaluate", recording)
        config = train_config("full", loss="ce", eval_every=1, **fields)
        return model, fit(model, TrainingData(ids[:14], ids[14:]), config), seen

    return make


def test_ranges_follow_and_freeze(run):
    _, _, seen = run(freeze_observers=2)
    assert seen[0] != seen[1] != seen[2] == seen[3] == seen[4]
    _, _, seen = run(freeze_observers=0)
    assert seen[0] == seen[4], "frozen from the beginning: what calibration found"


def test_the_best_state_has_its_ranges(run, monkeypatch):
    monkeypatch.setattr(Trainer, "held_out_loss", lambda self: float(self.result.steps))  # training only does harm
    model, result, seen = run(freeze_observers=100)
    assert result.best_step == 0
    assert [float(layer.act_scale) for layer in static_layers(model)] == seen[0] != seen[4]
