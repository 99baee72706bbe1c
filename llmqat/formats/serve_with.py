"""Grids that all engines and formats hold which a model is to be served with: chosen, or refused, before training.

`--serve-with vllm,gguf` names formats of `llmqat export`, and engines that run the packed directory.
"""

from transformers import PreTrainedModel

from llmqat.config import Recipe, Resolved
from llmqat.errors import LlmqatError
from llmqat.formats.export.check import check_grids
from llmqat.formats.export.gguf_families import family_of
from llmqat.formats.export.holds import HOLDS, RUN_PACKED, Holds
from llmqat.formats.given_grid import with_given_grid
from llmqat.models.coverage import CoverageReport
from llmqat.models.planning import checked_plan, resolve_for
from llmqat.nn.linear_like import is_transposed


def served_with(recipe: Recipe) -> dict[str, Holds]:
    """The formats and engines that a recipe names, with the grids that each holds.

    Raises:
        LlmqatError: if one is unknown.
    """
    known = {**HOLDS, **RUN_PACKED}
    unknown = [name for name in recipe.quant.served_with if name not in known]
    if unknown:
        raise LlmqatError(f"--serve-with does not know {unknown[0]!r}; choose of {', '.join(known)}")
    return {name: known[name] for name in recipe.quant.served_with}


def resolve_to_serve(model: PreTrainedModel, recipe: Recipe) -> Resolved:
    """The recipe with everything chosen that it leaves open; on the grid of the codes that it starts from, if any are
    given, and with scales of a dtype that all it is served with hold.

    The group sizes that `resolve_for` chooses from are held by all of them.

    Raises:
        LlmqatError: see `with_given_grid`, `served_with` and `resolve_for`.
    """
    recipe = with_given_grid(recipe, model)
    dtypes = {holds.scale_dtype for holds in served_with(recipe).values() if holds.scale_dtype}
    if dtypes and recipe.quant.scale_dtype is None:
        recipe = recipe.with_values({"quant.scale_dtype": dtypes.pop()})
    return resolve_for(model, recipe)


def plan_to_serve(model: PreTrainedModel, recipe: Resolved) -> CoverageReport:
    """The plan of a recipe, every grid in it held by all that it is to be served with.

    Raises:
        LlmqatError: naming what does not hold which layer, with the nearest grid that it does; see `checked_plan`.
    """
    quant = recipe.quant
    coverage = checked_plan(model, recipe.scheme(), quant.overrides, quant.lm_head_bits, quant.min_coverage)
    modules = dict(model.named_modules())
    turned = [layer.name for layer in coverage.quantized if is_transposed(modules.get(layer.name))]
    for name, holds in served_with(recipe).items():
        if name == "gguf":
            family_of(model.config)
        if turned and not holds.transposed:
            raise LlmqatError(f"{name} cannot hold {turned[0]}, whose weight is (in, out), as in Conv1D; leave it out")
        check_grids(holds, name, coverage.layers)
    return coverage
