"""The lengths of a recipe, as far as the context of a model allows them."""

from dataclasses import replace

from llmqat.config.recipe import Recipe, Resolved
from llmqat.progress import log


def fit_context(recipe: Resolved, context: int | None) -> Resolved:
    """A recipe whose sequences and windows are no longer than the model's context, in tokens; None for no limit."""
    if context is None:
        return recipe
    prompt, new_tokens = speed_lengths(recipe.eval.prompt, recipe.eval.new_tokens, context)
    return replace(
        recipe,
        data=replace(recipe.data, length=min(recipe.data.length, context)),
        eval=replace(recipe.eval, window=min(recipe.eval.window, context), prompt=prompt, new_tokens=new_tokens),
    )


def speed_lengths(prompt: int, new_tokens: int, context: int | None) -> tuple[int, int]:
    """Prompt and new tokens of a measurement of speed, as far as the context of the model allows."""
    if context is None:
        return prompt, new_tokens
    prompt = min(prompt, max(1, context - new_tokens))
    return prompt, min(new_tokens, context - prompt)


def log_cut(asked: Recipe, found: Resolved) -> None:
    """Say so where `fit_context` found that a recipe asked for sequences or windows longer than the context."""
    if found.data.length < asked.data.length or found.eval.window < asked.eval.window:
        context = max(found.data.length, found.eval.window)
        log(f"the model's context is {context} tokens: sequences and windows are cut to it")
