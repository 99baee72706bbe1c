"""The grid of a run that starts from the codes of a packed directory: that of the directory."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from llmqat.algorithms.gptq_model import GptqSettings
from llmqat.config import QuantConfig, Recipe
from llmqat.errors import LlmqatError
from llmqat.formats.given_codes import grids_in, take_codes
from llmqat.formats.reader import is_packed
from llmqat.models.coverage import CoverageReport
from llmqat.models.foreign import local_directory
from llmqat.models.patcher import prepare
from llmqat.models.planning import plan
from llmqat.models.prepare_options import PrepareOptions
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
    common = most_common(schemes)
    default = {field.name: getattr(QuantConfig(), field.name) for field in fields(QuantConfig)}
    theirs = {**default, **common.to_dict(), **exceptions(model, schemes, common)}
    for name in GRID:
        if getattr(quant, name) not in (default[name], theirs[name]):
            raise LlmqatError(
                f"--codes-from {directory} is {common}, and not of {name} {getattr(quant, name)}; leave that out"
            )
    return replace(recipe, quant=replace(quant, **{name: theirs[name] for name in GRID}))


def exceptions(model: PreTrainedModel, schemes: Mapping[str, QuantScheme], common: QuantScheme) -> dict[str, Any]:
    """Overrides and bits of the head that, beside the `common` scheme, give every layer of a model its own."""
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    planned = (layer.name for layer in plan(model, common).quantized)
    changes: dict[str, Any] = {rf"^{re.escape(name)}$": "float" for name in planned if name not in schemes}
    usual = common.to_dict()
    for name, scheme in schemes.items():
        if scheme != common and name != head:
            changed = {key: value for key, value in scheme.to_dict().items() if value != usual[key]}
            changes[rf"^{re.escape(name)}$"] = changed
    return {"overrides": changes, "lm_head_bits": schemes[head].bits if head in schemes else None}


def most_common(schemes: Mapping[str, QuantScheme]) -> QuantScheme:
    """The scheme of most layers."""
    return Counter(schemes.values()).most_common(1)[0][0]


def prepare_from(model: PreTrainedModel, directory: str | Path, **options: Any) -> CoverageReport:
    """Put a float model on the grid of a packed one that was made of it, with its codes and scales, in place.

    In place of `prepare`, to train from what another tool, or an earlier run, has found.

    Args:
        model: the float model.
        directory: packed, or a Hub id, such as the output of `import_checkpoint`.
        options: fields of `PrepareOptions` that say nothing of the grid, such as ``keep_float=True``.

    Returns:
        every linear layer with its grid or the reason why it stays float.

    Raises:
        LlmqatError: if the packed model is damaged, or was made of another float model; see `prepare`.
    """
    schemes = grids_in(directory)
    common = most_common(schemes)
    report = prepare(model, common, **exceptions(model, schemes, common), **options)
    take_codes(model, directory, GptqSettings(keep_float=PrepareOptions.by_name(options).keep_float))
    return report
