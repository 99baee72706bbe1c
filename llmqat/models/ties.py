"""Tied weights: which tensors a family may share, and which of them a model does share.

`tie_word_embeddings` of a config is what somebody wrote, not what the weights are: a merged adapter leaves a head of
its own behind a flag that says tied. The tensors decide, and the flag follows them.
"""

from typing import Any

from transformers import PreTrainedModel


def possible_ties(model: PreTrainedModel) -> dict[str, str]:
    """Every tensor that the family ties when its config says so, and the one it is tied to."""
    before = getattr(model.config, "tie_word_embeddings", False)
    try:
        model.config.tie_word_embeddings = True
        ties: dict[str, str] = model.get_expanded_tied_weights_keys(all_submodels=True)
        return ties
    finally:
        model.config.tie_word_embeddings = before


def shared_ties(model: PreTrainedModel) -> dict[str, str]:
    """The pairs of `possible_ties` that are one tensor in `model`."""
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    return {
        name: source
        for name, source in possible_ties(model).items()
        if name in tensors and tensors[name] is tensors.get(source)
    }


def set_tied(config: Any, tied: bool) -> None:
    """Say in `config`, and in that of its text model, whether tied tensors are one."""
    for one in (config, config.get_text_config()):
        if getattr(one, "tie_word_embeddings", tied) != tied:
            one.tie_word_embeddings = tied


def correct_flag(model: PreTrainedModel) -> None:
    """Bring the config of a loaded model in line with its tensors: whoever ties again must not undo what was loaded."""
    ties = possible_ties(model)
    if ties:
        set_tied(model.config, shared_ties(model).keys() == ties.keys())
