"""Grids that all engines and formats hold which a model is to be served with: chosen, or refused, before training.

`--serve-with vllm,gguf` names formats of `llmqat export`, and engines that run the packed directory.
"""

from transformers import PreTrainedModel

from llmqat.config import Recipe, Resolved
from llmqat.errors import LlmqatError
from llmqat.formats.export.check import arithmetic_conflict, conflict, in_one_line
from llmqat.formats.export.gguf_families import family_of
from llmqat.formats.export.holds import HOLDS, RUN_PACKED, Holds
from llmqat.formats.given_grid import with_given_grid
from llmqat.models.coverage import CoverageReport
from llmqat.models.planning import checked_plan, resolve_for


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
        LlmqatError: naming all that do not hold it, and the nearest grid that all do; see `checked_plan`.
    """
    quant = recipe.quant
    coverage = checked_plan(model, recipe.scheme(), quant.overrides, quant.lm_head_bits, quant.min_coverage)
    served = served_with(recipe)
    if "gguf" in served:
        family_of(model.config)
    conflicts = in_one_line(
        {
            name: conflict(holds, coverage.layers, list(served.values()))
            or arithmetic_conflict(holds, coverage.layers, quant.kv_bits)
            for name, holds in served.items()
        }
    )
    if conflicts:
        raise LlmqatError(conflicts)
    return coverage
