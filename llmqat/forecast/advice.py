"""Whether a run fits its machine, and the flags that make it fit."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from llmqat.config import DEFAULT_LR_SCALE, Resolved
from llmqat.forecast.stages import Forecast


class Remedy(NamedTuple):
    """Flags that lower the peak of memory.

    Attributes:
        flags: as they are typed.
        section: of the recipe that they change; empty for the recipe itself.
        values: that they give it.
    """

    flags: str
    section: str
    values: dict[str, Any]

    def applied(self, recipe: Resolved) -> Resolved:
        """The recipe with the values of the flags."""
        if not self.section:
            return replace(recipe, **self.values)
        section = getattr(recipe, self.section)
        return replace(recipe, **{self.section: replace(section, **self.values)})


class Fit(NamedTuple):
    """A way to run within the memory there is.

    Attributes:
        flags: to add to the command; empty where it fits as it is.
        forecast: with them.
    """

    flags: tuple[str, ...]
    forecast: Forecast


def remedies(recipe: Resolved) -> list[Remedy]:
    """Ways to need less memory, from the one that costs the least: first those that change no result."""
    train, found = recipe.train, []
    if not train.gradient_checkpointing:
        found.append(Remedy("--gradient-checkpointing", "train", {"gradient_checkpointing": True}))
    if train.batch_size > 1:
        accumulation = train.batch_size * train.accumulation
        flags = f"--batch-size 1 --accumulation {accumulation}"
        found.append(Remedy(flags, "train", {"batch_size": 1, "accumulation": accumulation}))
    if train.mode == "full":
        if train.optimizer == "adamw":
            found.append(Remedy("--optimizer adamw8bit", "train", {"optimizer": "adamw8bit"}))
        found.append(Remedy("--train lora", "train", {"mode": "lora", "lr_scale": DEFAULT_LR_SCALE["lora"]}))
    if not recipe.low_memory and recipe.quant.average_bits is None:
        found.append(Remedy("--low-memory", "", {"low_memory": True}))
    if recipe.init.by_blocks:
        found.append(Remedy("--init rtn", "init", {"method": "rtn"}))
    if train.mode == "lora" and train.lr_scale > 0:
        found.append(Remedy("--lr-scale 0", "train", {"lr_scale": 0.0}))
    return found


def fitting(
    recipe: Resolved, forecast: Forecast, predict: Callable[[Resolved], Forecast], available: float
) -> Fit | None:
    """The first flags, in the order of `remedies` and each kept if it helps, with which a run needs no more than
    `available` bytes; None if there are none.

    Args:
        recipe: of the run as it is.
        forecast: of that.
        predict: forecasts another recipe.
        available: bytes.
    """
    flags: list[str] = []
    for remedy in remedies(recipe):
        if forecast.worst.bytes <= available:
            break
        changed = remedy.applied(recipe)
        lower = predict(changed)
        if lower.worst.bytes < forecast.worst.bytes:
            recipe, forecast = changed, lower
            flags.append(remedy.flags)
    return Fit(tuple(flags), forecast) if forecast.worst.bytes <= available else None
