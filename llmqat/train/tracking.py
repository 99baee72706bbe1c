"""Curves by an experiment tracker of accelerate: what has to be there before training."""

from pathlib import Path

from llmqat.errors import LlmqatError


def check_tracker(name: str | None, directory: Path | None) -> None:
    """Whether accelerate can write curves with tracker `name` for a run whose checkpoints go to `directory`.

    Raises:
        LlmqatError: if its package is not installed (accelerate would leave it out silently), or TensorBoard has no
            place for its files.
    """
    from accelerate.tracking import get_available_trackers

    if name is None:
        return
    if name not in {str(tracker.value) for tracker in get_available_trackers()}:
        raise LlmqatError(f"--tracker {name} needs the package {name}; pip install {name}, or leave --tracker out")
    if name == "tensorboard" and directory is None:
        raise LlmqatError("the tensorboard tracker writes beside the checkpoints; give finetune an output directory")
