"""The bits of each layer of a run, where its recipe asks for an average."""

from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from llmqat.config import Resolved
from llmqat.data.corpus import Corpus
from llmqat.models.sensitivity import MEASURED_TOKENS, TOGETHER, choose_bits
from llmqat.pipeline.inputs import calibration


def with_chosen_bits(
    recipe: Resolved, model: PreTrainedModel, tokenizer: Any, corpus: Corpus, device: torch.device
) -> Resolved:
    """The recipe with the bits of each layer as overrides, before those that it has, in place of their average.

    A resumed run, or another one of its recipe.yaml, finds them there and measures nothing.

    Args:
        recipe: of the run.
        model: float.
        tokenizer: of the model.
        corpus: dataset of the run; layers are measured on some of its calibration tokens.
        device: that computes.

    Raises:
        LlmqatError: see `choose_bits`.
    """
    average, overrides = recipe.quant.average_bits, recipe.quant.overrides
    if average is None:
        return recipe
    rows = torch.cat(calibration(recipe, tokenizer, corpus.train))
    few, together = (max(1, tokens // rows.shape[1]) for tokens in (MEASURED_TOKENS, TOGETHER))
    batches = rows[:few].split(together)
    home = model.device
    model.to(device)  # type: ignore[arg-type]
    chosen = choose_bits(model, recipe.scheme(), batches, average, overrides=overrides, seed=recipe.seed)
    model.to(home)  # type: ignore[arg-type]
    return replace(recipe, quant=replace(recipe.quant, average_bits=None, overrides={**chosen, **overrides}))
