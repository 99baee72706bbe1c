"""The bundled recipes: where they are, by name, and the command that each opens with."""

from importlib.resources import files
from pathlib import Path

from llmqat.errors import LlmqatError


def recipe_folder() -> Path:
    """Where the bundled recipes are: inside the installed package, or beside it in a checkout."""
    inside = files("llmqat") / "recipes"
    return Path(str(inside)) if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def bundled_recipes() -> dict[str, Path]:
    """Bundled recipes by name; what lies in accelerate/ are launcher configurations."""
    paths = sorted(recipe_folder().rglob("*.yaml"))
    return {path.stem: path for path in paths if path.parent.name != "accelerate"}


def bundled_scripts() -> dict[str, Path]:
    """Bundled recipes that are Python scripts, by name: what takes a training loop of one's own."""
    folder = recipe_folder()
    return {path.stem: path for path in sorted([*folder.glob("*.py"), *folder.glob("trainers/*.py")])}


def command_of(recipe: Path) -> str:
    """The command that a recipe opens with."""
    lines = (line.lstrip("# ") for line in recipe.read_text("utf-8").splitlines())
    return next((line for line in lines if line.startswith(("llmqat ", "python "))), "")


def find_recipe(name: str) -> Path:
    """A recipe file, or a bundled recipe by its name.

    Raises:
        LlmqatError: if there is neither.
    """
    if Path(name).exists():
        return Path(name)
    bundled = bundled_recipes()
    if name not in bundled:
        raise LlmqatError(f"no recipe {name}: neither a file nor one of the bundled ones ({', '.join(bundled)})")
    return bundled[name]
