"""Lengths cut to the context of a model."""

from llmqat.config import Recipe, fit_context, log_cut, resolve


def recipe(**values):
    asked = Recipe().with_values({name.replace("_", ".", 1): value for name, value in values.items()})
    return asked, resolve(asked, 1000)


def test_context_shortens_sequences(capsys):
    asked, resolved = recipe(data_length=512, eval_window=100, eval_prompt=60, eval_new_tokens=10)
    fitted = fit_context(resolved, 64)
    assert (fitted.data.length, fitted.eval.window, fitted.eval.prompt, fitted.eval.new_tokens) == (64, 64, 54, 10)
    log_cut(asked, fitted)
    assert "the model's context is 64 tokens: sequences and windows are cut to it" in capsys.readouterr().err
    small = fit_context(resolved, 8)
    assert small.eval.prompt + small.eval.new_tokens <= 8
    assert min(small.eval.prompt, small.eval.new_tokens) >= 1


def test_nothing_is_cut_that_fits(capsys):
    asked, resolved = recipe(data_length=64, eval_window=64, eval_prompt=8, eval_new_tokens=4)
    assert fit_context(resolved, None) == fit_context(resolved, 64) == resolved
    log_cut(asked, resolved)
    assert capsys.readouterr().err == ""
