"""Say what the numbers of a training run ask for."""

from llmqat.train.loop import TrainResult

# Shares of codes, of weights and of the steps.
FEW_FLIPPED, MANY_CLIPPED, EARLY = 0.0005, 0.02, 0.5


def remedies(training: TrainResult, mode: str) -> list[str]:
    """Advice for the next run, a line each, most telling first; none where the numbers are as they should be.

    Args:
        training: the outcome of a run.
        mode: what trained.
    """
    found = []
    flipped = max(training.flipped.values(), default=0.0)
    if mode != "scales" and flipped < FEW_FLIPPED:
        found.append(
            f"training flipped {flipped:.3%} of the codes at most, and what it learned is in scales and norms: give "
            "more steps (--max-steps), or raise the learning rate (--lr)"
        )
    elif training.best_step < EARLY * training.steps:
        found.append(
            f"the held-out loss was least at step {training.best_step} of {training.steps}, and what came after it was "
            "thrown away: lower the learning rate (--lr)"
        )
    if training.clip_rate > MANY_CLIPPED:
        found.append(
            f"{training.clip_rate:.1%} of the weights lie beyond the ends of the grid, where nothing moves them back: "
            "give --clip-mask, or train the scales too (--lr-scale)"
        )
    return found
