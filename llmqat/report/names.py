"""Names as a report may publish them, and as Markdown shows them."""

import re
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

from llmqat.config import Recipe

MARKS = re.compile(r"([\\`*_\[\]<>|~$&])")


def is_local(name: str) -> bool:
    """Whether `name` of a model or dataset is a path of this machine, and not a Hub id or an alias."""
    if PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name.startswith((".", "~")):
        return True
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a file system, or a null byte
        return False


def public_name(name: str) -> str:
    """`name` as it may be published: a Hub id or an alias as it is, of a path its last part alone."""
    if not is_local(name):
        return name
    return re.split(r"[/\\]", name.rstrip("/\\"))[-1] or "local"


def public_recipe(recipe: Recipe) -> Recipe:
    """A recipe without the folders of the machine that ran it."""
    calibration, given = recipe.data.calibration, recipe.init.codes_from
    calibration = None if calibration is None else public_name(calibration)
    init = replace(recipe.init, codes_from=None if given is None else public_name(given))
    data = replace(recipe.data, dataset=public_name(recipe.data.dataset), calibration=calibration)
    names = [public_name(name) for name in recipe.eval.other_texts]
    tools = ",".join(recipe.eval.other_tools) or None
    texts = replace(recipe.eval, also=",".join(dict.fromkeys(names)) or None, baselines=tools)
    model, output = public_name(recipe.model), public_name(recipe.output)
    return replace(recipe, model=model, output=output, init=init, data=data, eval=texts)


def one_line(text: str) -> str:
    """`text` without line breaks and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def markdown(text: str) -> str:
    """One line of Markdown that shows `text` as it is: nothing in it formats, links or opens HTML."""
    return MARKS.sub(r"\\\1", one_line(text))
