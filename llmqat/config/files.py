"""Recipes as YAML: read strictly, within limits of size and depth, and written.

What YAML offers beyond plain keys and values is refused, or reads as text: dates, objects, keys written twice. Aliases
stand for what they name, as long as the recipe written out stays small.
"""

from pathlib import Path
from typing import Any

import yaml

from llmqat.config.options import shown
from llmqat.config.recipe import Recipe, from_dict
from llmqat.errors import LlmqatError

MOST_BYTES = 1 << 20
MOST_DEPTH = 20
MOST_VALUES = 10_000


def from_yaml(path: Path) -> Recipe:
    """A recipe from a YAML file of differences.

    Raises:
        LlmqatError: if the file is missing, is not YAML, or holds a bad key or value.
    """
    text = _read(path)
    try:
        values = _plain_values(text)
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise LlmqatError(f"{path} is not YAML: {problem[:300]}") from error
    if values is not None and not isinstance(values, dict):
        raise LlmqatError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    try:
        return from_dict(values or {})
    except LlmqatError as error:
        raise LlmqatError(f"{path}: {error}") from error


def to_yaml(recipe: Recipe) -> str:
    """All values of a recipe, defaults included."""
    return str(yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _read(path: Path) -> str:
    """Text of a recipe file.

    Raises:
        LlmqatError: if it cannot be read, is no regular file, is larger than a recipe can be, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise LlmqatError(f"recipe {path} is no file; give a YAML file, or the name of a bundled recipe")
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise LlmqatError(
            f"cannot read recipe {path}: {error.strerror}; `llmqat recipes` lists the bundled ones"
        ) from error
    if len(data) > MOST_BYTES:
        raise LlmqatError(f"{path} has more than {MOST_BYTES} bytes, too many for a recipe; give a YAML recipe")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LlmqatError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


class _Loader(yaml.SafeLoader):
    """Plain values only; a key may be written once."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """A mapping, unless it has a key twice."""
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {shown(key.value)} twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        """A value; what its tag cannot read is an error of YAML."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as error:  # int() of 5000 digits, float() of text, an empty !!int
            problem = f"cannot read {shown(node.value)} as {node.tag.rpartition(':')[2]}"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from error


PLAIN_TAGS = ("null", "bool", "int", "float", "str", "seq", "map", "merge")
_Loader.yaml_constructors = {
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.rpartition(":")[2] in PLAIN_TAGS
}
_Loader.yaml_implicit_resolvers = {  # a date reads as text
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] in PLAIN_TAGS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _plain_values(text: str) -> Any:
    """The plain values of a YAML document.

    Raises:
        yaml.YAMLError: if it is not YAML, or deeper or larger than a recipe can be.
    """
    depth = 0
    for event in yaml.parse(text, Loader=_Loader):  # before anything recursive
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            raise yaml.YAMLError(f"nested more than {MOST_DEPTH} deep, {event.start_mark}")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, tuple[int, int]], depth: int) -> tuple[int, int]:
    """Values in `node` with its aliases written out, and how deep they lie.

    Raises:
        yaml.YAMLError: if that is more than a recipe can hold.
    """
    if depth > MOST_DEPTH:
        raise yaml.YAMLError(f"aliases nest more than {MOST_DEPTH} deep, {node.start_mark}")
    if id(node) not in known:
        children = node.value if isinstance(node, yaml.SequenceNode) else []
        if isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        counts = [_count(child, known, depth + 1) for child in children]
        known[id(node)] = 1 + sum(count for count, _ in counts), 1 + max((height for _, height in counts), default=0)
    count, height = known[id(node)]
    if count > MOST_VALUES or height > MOST_DEPTH + 1:
        raise yaml.YAMLError(f"aliases make it larger than {MOST_VALUES} values, {node.start_mark}")
    return count, height
