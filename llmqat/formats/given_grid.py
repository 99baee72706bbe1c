"""The grid of a run that starts from the codes of a packed directory: that of the directory."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from transformers import PreTrainedModel

from llmqat.config import QuantConfig, Recipe
from llmqat.errors import LlmqatError
from llmqat.formats.given_codes import grids_in
from llmqat.formats.reader import is_packed, local_directory
from llmqat.models.planning import plan
from llmqat.scheme import QuantScheme

# What a recipe says of the grid.
GRID = (
    "bits",
    "group_size",
    "symmetric",
    "act_bits",
    "act_static",
    "average_bits",
    "lm_head_bits",
    "overrides",
)


def with_given_grid(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with the grid of every layer in the packed directory that it starts from; as it is, if from none.

    Args:
        recipe: as it was asked for.
        model: float.

    Raises:
        LlmqatError: if it asks for a grid that is not that of the directory.
    """
    quant, directory = recipe.quant, recipe.init.codes_from
    if directory is None:
        return recipe
    if not is_packed(local_directory(directory)):
        raise LlmqatError(f"--codes-from {directory} is not packed; llmqat import makes it so, if it has codes")
    schemes = grids_in(directory)
    common = Counter(schemes.values()).most_common(1)[0][0]
    default = {field.name: getattr(QuantConfig(), field.name) for field in fields(QuantConfig)}
    theirs = {**default, **common.to_dict(), **exceptions(model, schemes, common)}
    for name in GRID:
        if getattr(quant, name) not in (default[name], theirs[name]):
            raise LlmqatError(
                f"--codes-from {directory} is {common}, and not of {name} {getattr(quant, name)}; leave that out"
            )
    return replace(recipe, quant=replace(quant, **{name: theirs[name] for name in GRID}))


def exceptions(model: PreTrainedModel, schemes: Mapping[str, QuantScheme], common: QuantScheme) -> dict[str, Any]:
    """What a recipe says beside the `common` scheme of a model's layers: its head, and other layers or float ones."""
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    planned = (layer.name for layer in plan(model, common).quantized)
    changes: dict[str, Any] = {rf"^{re.escape(name)}$": "float" for name in planned if name not in schemes}
    usual = common.to_dict()
    for name, scheme in schemes.items():
        if scheme != common and name != head:
            changed = {key: value for key, value in scheme.to_dict().items() if value != usual[key]}
            changes[rf"^{re.escape(name)}$"] = changed
    return {"overrides": changes, "lm_head_bits": schemes[head].bits if head in schemes else None}
