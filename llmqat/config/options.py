"""One recipe field: its default, its flag, what it may hold, and the line that says what is wrong with a value."""

import math
import types
from collections.abc import Mapping
from dataclasses import field
from reprlib import Repr
from typing import Any, Union, get_args, get_origin

from llmqat.errors import LlmqatError

MOST_WHOLE = 2**31 - 1  # of whole numbers without a limit of their own
LONGEST_TEXT = 4096  # characters: more than any path or name
ENGLISH = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}


def meta(
    help: str,
    flag: str | None = None,
    choices: tuple[Any, ...] = (),
    least: float | None = None,
    most: float | None = None,
    words: tuple[str, ...] = (),
    free: bool = False,
) -> dict[str, Any]:
    """The metadata of a recipe field: everything but its default."""
    limits = {"choices": choices, "least": least, "most": most, "words": words, "free": free}
    return {"help": help, "flag": flag, **limits}


def option(default: Any, help: str, flag: str | None = None, **limits: Any) -> Any:
    """A recipe field.

    Args:
        default: its value where a recipe does not say.
        help: what it means, in the help of the command line.
        flag: its flag there.
        limits: ``choices``, allowed values; ``least`` and ``most``; ``words`` that may stand in place of a number;
            ``free``, text of any length and characters instead of a name.
    """
    return field(default=default, metadata=meta(help, flag, **limits))


NO_LIMITS = meta("")


class _Short(Repr):
    """Representations of bounded length and depth, whatever the value: aliases make small files into large values."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 2
        self.maxstring = self.maxother = self.maxlong = 80
        self.maxlist = self.maxtuple = self.maxdict = self.maxset = 4

    def repr_int(self, x: int, level: int) -> str:
        """Digits, as far as Python writes them at all."""
        return f"a whole number of {x.bit_length()} bits" if abs(x) > 10**80 else repr(x)


shown = _Short().repr


def check_value(hint: Any, value: Any, name: str, limits: Mapping[str, Any]) -> Any:
    """The value of field `name`, whole numbers made floats where those are meant.

    Args:
        hint: type of the field.
        value: as it was read.
        name: dotted, for the message.
        limits: see `meta`.

    Raises:
        LlmqatError: if the type is wrong, or the value is not allowed.
    """
    if (value is None and type(None) in get_args(hint)) or (isinstance(value, str) and value in limits["words"]):
        return value
    wanted = _plain_type(hint)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MOST_WHOLE:
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        words = "".join(f" or {word}" for word in limits["words"])
        raise LlmqatError(f"{name} must be {ENGLISH[wanted]}{words}, got {shown(value)}{_number_hint(wanted, value)}")
    if limits["choices"] and value not in limits["choices"]:
        raise LlmqatError(f"{name} must be one of {', '.join(map(str, limits['choices']))}; got {shown(value)}")
    if isinstance(value, str):
        _check_text(value, name, limits["free"])
    if wanted in (int, float):
        _check_range(value, name, limits)
    return value


def _plain_type(hint: Any) -> Any:
    """The type of values of a field that are neither None nor words."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    return get_origin(hint) or hint


def _check_range(value: float, name: str, limits: Mapping[str, Any]) -> None:
    least, most = limits["least"], limits["most"]
    if most is None and isinstance(value, int):
        most = MOST_WHOLE
    if least is not None and not value >= least:
        raise LlmqatError(f"{name} must be at least {least:g}, got {shown(value)}")
    if most is not None and not value <= most:
        raise LlmqatError(f"{name} must be at most {_digits(most)}, got {shown(value)}")
    if not math.isfinite(value):
        raise LlmqatError(f"{name} must be a finite number, got {value}")


def _digits(limit: float) -> str:
    return str(limit) if isinstance(limit, int) else f"{limit:g}"


def _check_text(value: str, name: str, free: bool) -> None:
    """Text must be UTF-8; names of files, models and columns also short, of one line, and not empty."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise LlmqatError(f"{name} must be UTF-8 text, got {value[:80]!a}") from error
    if free:
        return
    if not value.strip():
        raise LlmqatError(f"{name} must not be empty; leave it out for its default")
    if len(value) > LONGEST_TEXT:
        raise LlmqatError(f"{name} must be at most {LONGEST_TEXT} characters long, got {len(value)}")
    if any(ord(character) < 32 or ord(character) == 127 for character in value):
        raise LlmqatError(f"{name} must not hold control characters, got {shown(value)}")


def _number_hint(wanted: type, value: Any) -> str:
    """YAML 1.1 reads 2e-4 as text: say what to write."""
    if wanted is not float or not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    if not math.isfinite(number):
        return ""
    mantissa, _, exponent = f"{number:e}".partition("e")
    return f" (text, to YAML); write {float(mantissa)}e{int(exponent):+d}"
