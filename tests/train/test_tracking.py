import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from llmqat.errors import LlmqatError
from llmqat.train.checkpoint import Checkpoints
from llmqat.train.loop import fit
from llmqat.train.tracking import check_tracker


def scalars(directory):
    """Tag -> {step: value} of the TensorBoard files below `directory`."""
    found = {}
    for path in directory.rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(path)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def test_tensorboard_holds_the_curves(prepared, train_config, tmp_path):
    run, config = prepared("full"), train_config("full", tracker="tensorboard")
    result = fit(run.model, run.data, config, teacher=run.teacher, checkpoints=Checkpoints(tmp_path))
    logged = scalars(tmp_path)
    assert logged["loss"] == pytest.approx(result.losses, rel=1e-6)
    assert logged["held_out_loss"] == pytest.approx(result.held_out, rel=1e-6)
    assert logged["codes_changed"] == pytest.approx(result.flipped, rel=1e-6)
    assert logged["lr"].keys() == logged["tokens_per_second"].keys() == {1, 2, 3, 4}
    assert min(logged["tokens_per_second"].values()) > 0
    assert logged["clip_rate"].keys() == {0, 2, 4}


def test_a_tracker_has_what_it_needs(tmp_path, monkeypatch):
    check_tracker(None, None)
    check_tracker("tensorboard", tmp_path)
    with pytest.raises(LlmqatError, match="writes beside the checkpoints; give finetune an output directory"):
        check_tracker("tensorboard", None)
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(LlmqatError, match="--tracker wandb needs the package wandb; pip install wandb, or leave"):
        check_tracker("wandb", tmp_path)
