"""Command-line flags from recipe fields, and recipes from flags."""

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any, NoReturn, get_args, get_type_hints

from llmqat.cli.recipes import find_recipe
from llmqat.config import Recipe, from_yaml
from llmqat.config.options import check_value, shown
from llmqat.errors import LlmqatError

SECTIONS = ("quant", "init", "train", "data", "eval")
LONGEST_MESSAGE = 400


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and no abbreviated flags."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Formatter, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Print one line and exit with 2."""
        line = " ".join(message.split())
        line = line if len(line) <= LONGEST_MESSAGE else f"{line[:LONGEST_MESSAGE]}..."
        self.exit(2, f"{self.prog}: {line}; see {self.prog} --help\n")


class Formatter(argparse.RawDescriptionHelpFormatter):
    """Help whose examples stay as they are written, wide enough for a flag and its text on one line."""

    def __init__(self, prog: str) -> None:
        columns = os.environ.get("COLUMNS", "")
        width = int(columns) if re.fullmatch(r"[0-9]{1,4}", columns) else 110
        super().__init__(prog, max_help_position=32, width=min(120, max(60, width)))


class Refuse(argparse.Action):
    """A flag of another command: named in the error, absent from the help."""

    def __init__(self, reason: str, **kwargs: Any) -> None:
        super().__init__(help=argparse.SUPPRESS, default=argparse.SUPPRESS, **kwargs)
        self.reason = reason

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        """Say why the flag has no meaning here, and exit with 2."""
        parser.error(f"{self.option_strings[0]} has no meaning here: {self.reason}; leave it out")


def add_recipe_flags(parser: argparse.ArgumentParser, refused: Mapping[str, str] | None = None) -> None:
    """A flag for every recipe field that has one.

    Args:
        parser: of a sub-command.
        refused: dotted names of fields, or names of sections, that the command cannot honour -> why not.
    """
    parser.add_argument("--recipe", metavar="FILE", help="YAML of differences from the defaults; flags win over it")
    hints, refused = get_type_hints(Recipe), refused or {}
    _add_section(parser, Recipe, "", "run", refused)
    for section in SECTIONS:
        title = (hints[section].__doc__ or section).rstrip(".")
        _add_section(parser, hints[section], f"{section}.", title, refused)
    parser.add_argument(
        "--override",
        action="append",
        metavar="PATTERN:CHANGE",
        help="layers matching the regular expression: float, or bits=8,group_size=-1; repeatable",
    )
    parser.add_argument("--asym", action="store_true", help="asymmetric: unsigned codes and an integer zero point")


def _add_section(
    parser: argparse.ArgumentParser, cls: type, prefix: str, title: str, refused: Mapping[str, str]
) -> None:
    hints = get_type_hints(cls)
    flagged = [f for f in fields(cls) if f.metadata.get("flag") and not is_dataclass(hints[f.name])]
    reasons = {f.name: refused.get(prefix + f.name) or refused.get(prefix.rstrip(".")) for f in flagged}
    group = parser.add_argument_group(title) if not all(reasons.values()) else parser
    for f in flagged:
        reason = reasons[f.name]
        if reason is None:
            _add_flag(group, f, hints[f.name], dest=prefix + f.name, default=argparse.SUPPRESS)
        else:
            count = 0 if hints[f.name] is bool else None
            parser.add_argument(f.metadata["flag"], action=Refuse, nargs=count, reason=reason)


def add_fields(
    parser: argparse.ArgumentParser, cls: type, names: Sequence[str], open_defaults: Mapping[str, str] | None = None
) -> None:
    """Flags for some fields of a section, under their plain names, with their defaults and limits.

    Args:
        parser: of a sub-command.
        cls: the section.
        names: of its fields.
        open_defaults: fields that are None where the flag is not given -> what the help says of that.
    """
    hints, open_defaults = get_type_hints(cls), open_defaults or {}
    for f in fields(cls):
        if f.name in names:
            default = None if f.name in open_defaults else f.default
            _add_flag(parser, f, hints[f.name], open_defaults.get(f.name), dest=f.name, default=default)


def _add_flag(group: Any, f: Field[Any], hint: Any, shown_default: str | None = None, **common: Any) -> None:
    flag, text = f.metadata["flag"], f.metadata["help"].replace("%", "%%")
    kinds = [kind for kind in (get_args(hint) or (hint,)) if kind is not type(None)]
    if kinds[0] is bool:
        group.add_argument(flag, action="store_true", help=text, **common)
        return
    choices = f.metadata["choices"] or None
    metavar = None if choices else {"int": "N", "float": "X"}.get(kinds[0].__name__, "TEXT")
    shown_default = shown_default or (None if f.default is None else str(f.default))
    default = f" (default: {shown_default})" if shown_default else ""
    kind = _number_or(kinds[0], f.metadata["words"]) if f.metadata["words"] else kinds[0]
    group.add_argument(flag, type=kind, choices=choices, metavar=metavar, help=text + default, **common)


def _number_or(kind: Callable[[str], Any], words: tuple[str, ...]) -> Callable[[str], Any]:
    """Reads one of `words` as itself, and anything else as a number."""

    def read(text: str) -> Any:
        try:
            return text if text in words else kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a number or {' or '.join(words)}, got {text[:80]!r}") from error

    return read


def check_fields(cls: type, values: Mapping[str, Any]) -> None:
    """Check values of flags that `add_fields` added, where they were given.

    Raises:
        LlmqatError: if one is out of its range, naming the flag.
    """
    hints = get_type_hints(cls)
    for f in fields(cls):
        if values.get(f.name) is not None:
            check_value(hints[f.name], values[f.name], f.metadata["flag"], f.metadata)


def recipe_from(args: argparse.Namespace, saved: Recipe | None = None) -> Recipe:
    """The recipe of the file, if one was named, else that of a run that goes on, with the flags over it.

    Raises:
        LlmqatError: if the file or a value is wrong.
    """
    recipe = from_yaml(find_recipe(args.recipe)) if args.recipe else saved or Recipe()
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
    """Pattern and change of an override such as ``'down_proj$:bits=8,group_size=-1'`` or ``'o_proj$:float'``.

    Raises:
        LlmqatError: if it is neither.
    """
    pattern, separator, change = text.rpartition(":")
    pairs = [part.partition("=") for part in change.split(",")]
    if separator and change == "float":
        return pattern, "float"
    if not separator or not all(eq and re.fullmatch(r"-?[0-9]{1,9}|true|false", value) for _, eq, value in pairs):
        raise LlmqatError(
            f"cannot read --override {shown(text)}; write 'PATTERN:float' or 'PATTERN:bits=8,group_size=-1', for "
            "example 'down_proj$:bits=8'"
        )
    return pattern, {key: value == "true" if value in ("true", "false") else int(value) for key, _, value in pairs}
