"""Command-line flags from recipe fields, and recipes from flags."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any, NoReturn, get_args, get_type_hints

from llmqat.cli.recipes import find_recipe
from llmqat.config import Recipe, from_yaml
from llmqat.errors import LlmqatError

SECTIONS = ("quant", "init", "train", "data", "eval")


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Examples stay as they are written; wide enough for a flag and its help on one line."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(120, int(os.environ.get("COLUMNS", "110"))))


def add_recipe_flags(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    """A flag for every recipe field that has one; those of `skip` (sections) are left out."""
    parser.add_argument("--recipe", metavar="FILE", help="YAML of differences from the defaults; flags win over it")
    _add_section(parser, Recipe, "", "run")
    hints = get_type_hints(Recipe)
    for section in SECTIONS:
        if section not in skip:
            _add_section(parser, hints[section], f"{section}.", (hints[section].__doc__ or section).rstrip("."))
    parser.add_argument(
        "--override",
        action="append",
        metavar="PATTERN:CHANGE",
        help="layers matching the regular expression: float, or bits=8,group_size=-1; repeatable",
    )
    parser.add_argument("--asym", action="store_true", help="asymmetric: unsigned codes and an integer zero point")


def _add_section(parser: argparse.ArgumentParser, cls: type, prefix: str, title: str) -> None:
    group = parser.add_argument_group(title)
    hints = get_type_hints(cls)
    for f in fields(cls):
        flag = f.metadata.get("flag")
        if flag is not None and not is_dataclass(hints[f.name]):
            _add_flag(group, f, hints[f.name], dest=prefix + f.name, default=argparse.SUPPRESS)


def add_fields(parser: argparse.ArgumentParser, cls: type, names: Sequence[str]) -> None:
    """Flags for some fields of a section, under their plain names and with their defaults."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        if f.name in names:
            _add_flag(parser, f, hints[f.name], dest=f.name, default=f.default)


def _add_flag(group: Any, f: Field[Any], hint: Any, **common: Any) -> None:
    flag, text = f.metadata["flag"], f.metadata["help"].replace("%", "%%")
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if kinds[0] is bool:
        group.add_argument(flag, action="store_true", help=text, **common)
        return
    choices = f.metadata["choices"] or None
    metavar = None if choices else {"int": "N", "float": "X"}.get(kinds[0].__name__, "TEXT")
    default = "" if f.default is None else f" (default: {f.default})"
    kind = _number_or(kinds[0], f.metadata["words"]) if f.metadata["words"] else kinds[0]
    group.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=text + default, **common)


def _number_or(kind: Callable[[str], Any], words: tuple[str, ...]) -> Callable[[str], Any]:
    """Reads one of `words` as itself, and anything else as a number."""

    def read(text: str) -> Any:
        try:
            return text if text in words else kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a number or {' or '.join(words)}, got {text!r}") from error

    return read


def recipe_from(args: argparse.Namespace) -> Recipe:
    """The recipe of the file, if one was named, with the flags over it.

    Raises:
        LlmqatError: if the file or a value is wrong.
    """
    recipe = from_yaml(find_recipe(args.recipe)) if args.recipe else Recipe()
    known = [f"{section}." for section in SECTIONS]
    names = {f.name for f in fields(Recipe)}
    values = {k: v for k, v in vars(args).items() if k in names or any(k.startswith(s) for s in known)}
    if args.asym:
        values["quant.symmetric"] = False
    if args.override:
        parsed = dict(parse_override(text) for text in args.override)
        values["quant.overrides"] = {**recipe.quant.overrides, **parsed}
    return recipe.with_values(values)


def parse_override(text: str) -> tuple[str, Any]:
    """``'down_proj$:bits=8,group_size=-1'`` or ``'o_proj$:float'`` to pattern and change.

    Raises:
        LlmqatError: if it is neither.
    """
    pattern, separator, change = text.rpartition(":")
    pairs = [part.partition("=") for part in change.split(",")]
    if separator and change == "float":
        return _checked(pattern), "float"
    if not separator or not all(eq and re.fullmatch(r"-?\d+|true|false", value) for _, eq, value in pairs):
        raise LlmqatError(
            f"cannot read --override {text!r}; write 'PATTERN:float' or 'PATTERN:bits=8,group_size=-1', for example "
            "'down_proj$:bits=8'"
        )
    return _checked(pattern), {
        key: value == "true" if value in ("true", "false") else int(value) for key, _, value in pairs
    }


def _checked(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise LlmqatError(
            f"{pattern!r} is no regular expression ({error}); write something like 'down_proj$'"
        ) from error
    return pattern
