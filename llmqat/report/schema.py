"""The shape of `report.json` and `details.json`, checked before they are drawn: both may be foreign."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llmqat.config import BASELINES, LOSSES, MODES
from llmqat.errors import LlmqatError
from llmqat.report.scoreboard import LABELS, VARIANTS

# Raises a LlmqatError that opens with the second argument, the place of the value, if the first is wrong.
Check = Callable[[Any, str], None]

FORMAT = 1
LATER = ("given", *BASELINES)  # variants that this format had not from the beginning
MOST = 1e100  # of any number: what a page computes of it stays finite
DEPTH = 8  # of nested values


def fail(place: str, expected: str, value: object) -> None:
    """Raise the error of a wrong value."""
    shown = repr(value)
    raise LlmqatError(f"{place} must be {expected}, got {shown if len(shown) <= 60 else shown[:57] + '...'}")


def number(value: Any, place: str) -> None:
    """A finite number, not a bool."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) <= MOST:
        fail(place, "a number", value)


def positive(value: Any, place: str) -> None:
    """A number above 0."""
    number(value, place)
    if value <= 0:
        fail(place, "above 0", value)


def count(value: Any, place: str) -> None:
    """A whole number of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST:
        fail(place, "a whole number of at least 0", value)


def integer(value: Any, place: str) -> None:
    """A whole number of either sign."""
    if not isinstance(value, int) or isinstance(value, bool) or not abs(value) <= MOST:
        fail(place, "a whole number", value)


def flag(value: Any, place: str) -> None:
    """True or false."""
    if not isinstance(value, bool):
        fail(place, "true or false", value)


def text(value: Any, place: str) -> None:
    """Text that UTF-8 can write."""
    if not isinstance(value, str):
        fail(place, "text", value)
    try:
        value.encode()
    except UnicodeEncodeError:
        fail(place, "text in UTF-8", value)


def choice(*allowed: Any) -> Check:
    """One of some values."""

    def check(value: Any, place: str) -> None:
        if not any(value == option and type(value) is type(option) for option in allowed):
            fail(place, f"one of {', '.join(map(str, allowed))}", value)

    return check


def optional(inner: Check) -> Check:
    """Null, or a value that `inner` accepts."""
    return lambda value, place: None if value is None else inner(value, place)


def many(inner: Check) -> Check:
    """A list of what `inner` accepts."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, list):
            fail(place, "a list", value)
        for index, item in enumerate(value):
            inner(item, f"{place}[{index}]")

    return check


def by_name(inner: Check) -> Check:
    """A mapping of names to what `inner` accepts."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            fail(place, "a mapping", value)
        for key, item in value.items():
            text(key, f"a key of {place}")
            inner(item, f"{place}.{key}")

    return check


def record(required: Mapping[str, Check], optional: Mapping[str, Check] | None = None) -> Check:
    """A mapping that has all the `required` keys; those that it has beside them are not looked at unless `optional`."""

    def check(value: Any, place: str) -> None:
        if not isinstance(value, dict):
            fail(place, "a mapping", value)
        for key, inner in required.items():
            if key not in value:
                raise LlmqatError(f"{place} has no {key}")
            inner(value[key], f"{place}.{key}")
        for key, inner in (optional or {}).items():
            if key in value:
                inner(value[key], f"{place}.{key}")

    return check


def plain(value: Any, place: str, depth: int = DEPTH) -> None:
    """Nested text, numbers, lists and mappings, `depth` levels of them at most."""
    if depth == 0:
        fail(place, f"nested {DEPTH} levels at most", value)
    if isinstance(value, dict):
        for key, item in value.items():
            text(key, f"a key of {place}")
            plain(item, f"{place}.{key}", depth - 1)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            plain(item, f"{place}[{index}]", depth - 1)
    elif isinstance(value, str):
        text(value, place)
    elif value is not None and not isinstance(value, bool):
        number(value, place)


def pair(value: Any, place: str) -> None:
    """A point of a curve: step and value."""
    many(number)(value, place)
    if len(value) != 2:
        fail(place, "a step and a value", value)


def shares(names: tuple[str, ...]) -> Check:
    """A number or null for each of `names`."""
    return record(dict.fromkeys(names, optional(number)))


def scores(names: tuple[str, ...], inner: Check) -> Check:
    """A value or null for each variant of the scoreboard; reports of earlier versions lack the `LATER` ones."""
    always = [name for name in names if name not in LATER]
    return record(dict.fromkeys(always, optional(inner)), dict.fromkeys(LATER, optional(inner)))


RECIPE = record(
    {
        "train": record({"mode": optional(choice(*MODES)), "loss": choice(*LOSSES)}),
        "eval": record({"prompt": count, "new_tokens": count, "repeats": count}),
    }
)


def recipe(value: Any, place: str) -> None:
    """A resolved recipe: plain values, and what the page reads of them."""
    plain(value, place)
    RECIPE(value, place)


SCORES: dict[str, Check] = {
    "perplexity": scores(VARIANTS, positive),
    "gap_recovered": optional(number),
    "kl_to_float": scores(VARIANTS[1:], number),
    "top1_agreement": scores(VARIANTS[1:], number),
}

REPORT = record(
    {
        "format": choice(FORMAT),
        "llmqat": text,
        "model": text,
        "recipe": recipe,
        "environment": by_name(plain),
        "tokens": record(
            {"train": optional(count), "calibration": optional(count), "eval": count, "eval_sha256": text}
        ),
        **SCORES,
        "coverage": record({"parameters_quantized": number, "skipped": many(record({"layer": text, "reason": text}))}),
        "size": record({key: optional(number) for key in ("float_bytes", "packed_bytes", "bits_per_weight")}),
        "throughput": record(
            {
                "kernel": optional(text),
                "float": shares(("prefill_tok_s", "decode_tok_s")),
                "packed": record(
                    dict.fromkeys(("prefill_tok_s", "decode_tok_s", "weight_gb_s"), optional(number)),
                    {"path": optional(text)},
                ),
            }
        ),
        "training": record(
            {
                "steps": optional(count),
                "seconds": optional(number),
                "peak_memory_bytes": optional(number),
                "codes_changed": optional(number),
                "clip_rate": optional(number),
            },
            {"peak_device_memory_bytes": optional(number)},
        ),
        "verify": record(
            {
                "codes_equal": optional(flag),
                "scales_equal": optional(flag),
                "max_logit_error": optional(number),
                "bound": optional(number),
            },
            {
                "changed": optional(many(text)),
                "decode_error": optional(number),
                "decode_bound": optional(number),
                "greedy_equal": optional(flag),
            },
        ),
    },
    {
        "stored_format": optional(text),
        "device": text,
        "baselines": by_name(record({"versions": by_name(text), "seconds": number, "cpu_seconds": number})),
        "also": by_name(record({"tokens": count, "sha256": text, **SCORES})),
    },
)

LAYER = record(
    {
        "name": text,
        "shape": many(count),
        "scheme": text,
        "errors": by_name(number),
        "codes_changed": optional(number),
    }
)
DRAWN_LAYER = record(
    {"limit": number, "float": optional(many(count)), "grid": many(count), "first_code": integer, "codes": many(count)}
)


def layer(value: Any, place: str) -> None:
    """A layer, with its histograms if it has any."""
    LAYER(value, place)
    if "codes" in value:
        DRAWN_LAYER(value, place)


CURVES = record({}, {"loss": many(pair), "held_out": many(pair), "flipped": many(pair), "best_step": optional(number)})

DETAILS = record(
    {"format": choice(FORMAT)},
    {
        "scheme": text,
        "verdict": text,
        "measured_on": text,
        "interval": optional(record({"against": choice(*LABELS), "low": number, "high": number})),
        "curves": CURVES,
        "layers": many(layer),
    },
)


def read(path: Path, check: Check) -> dict[str, Any]:
    """The values of a JSON file.

    Raises:
        LlmqatError: if it cannot be read, is not JSON, or `check` refuses what it holds.
    """
    try:
        values: Any = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise LlmqatError(f"{path} is damaged; run it again, or copy it again") from error
    try:
        check(values, path.stem)
    except LlmqatError as error:
        raise LlmqatError(f"{path} is not one of this version of llmqat: {error}; run it again") from error
    assert isinstance(values, dict)
    return values
