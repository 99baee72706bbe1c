"""Recipes: every choice of a run, as dataclasses read from YAML, from flags, or from Python.

One source for the YAML keys, the command-line flags and their help: the `option` of each field. A recipe file holds
differences from the defaults; the fully resolved recipe is written beside the weights.
"""

import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from llmqat.errors import LlmqatError
from llmqat.scheme import BITS, QuantScheme

INITS = ("gptq", "rtn")
MODES = ("full", "lora", "scales")
LOSSES = ("kd", "ce")
OBSERVERS = ("minmax", "moving_average", "percentile", "mse")
PRECISIONS = ("bf16", "fp32")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
ROWS = ("auto", "text", "chat")
BOS_RULES = ("stream", "window", "tokenizer", "none")


def meta(
    help: str,
    flag: str | None = None,
    choices: tuple[Any, ...] = (),
    least: float | None = None,
    most: float | None = None,
    words: tuple[str, ...] = (),
) -> dict[str, Any]:
    """What a recipe field carries besides its default."""
    return {"help": help, "flag": flag, "choices": choices, "least": least, "most": most, "words": words}


def option(
    default: Any,
    help: str,
    flag: str | None = None,
    choices: tuple[Any, ...] = (),
    least: float | None = None,
    most: float | None = None,
    words: tuple[str, ...] = (),
) -> Any:
    """A recipe field: default, help, its flag on the command line, allowed values, the least and the greatest one, and
    words that may stand in place of a number."""
    return field(default=default, metadata=meta(help, flag, choices, least, most, words))


@dataclass(frozen=True)
class QuantConfig:
    """The grid."""

    bits: int = option(4, "bits per weight", "--bits", choices=BITS)
    group_size: int | None = option(
        None, "weights per scale; -1: one per row; default: 32 below 2 B parameters, else 128", "--group-size"
    )
    symmetric: bool = option(True, "signed codes without zero point, which every serving format takes without loss")
    act_bits: int | None = option(None, "8: int8 activations, per token and dynamic", "--act-bits", choices=(8,))
    act_static: bool = option(False, "int8 activations with one observed scale for each layer", "--act-static")
    observer: str = option("mse", "how the ranges of static activations are found", "--observer", choices=OBSERVERS)
    lm_head_bits: int | None = option(
        None,
        "quantize the output head too, at 8 or 4 bits; a tied embedding shares its codes; default: both stay float",
        "--lm-head-bits",
        choices=(4, 8),
    )
    kv_bits: int | None = option(
        None, "8: int8 keys and values in the cache, a scale per token and head", "--kv-bits", choices=(8,)
    )
    overrides: dict[str, Any] = field(default_factory=dict, metadata=meta("regular expression on layers -> change"))
    min_coverage: float = option(
        0.9,
        "least share of the block parameters that must lie in layers that can be quantized",
        "--min-coverage",
        least=0.0,
        most=1.0,
    )
    clip_mask: bool = option(False, "stop gradients of weights beyond the ends of the grid", "--clip-mask")


@dataclass(frozen=True)
class InitConfig:
    """Where training starts: post-training quantization."""

    method: str = option("gptq", "initial codes", "--init", choices=INITS)
    smooth: float | str | None = option(
        None,
        "SmoothQuant strength in [0, 1]: fold activation outliers into the weights first; auto: searched by site",
        "--smooth",
        least=0.0,
        most=1.0,
        words=("auto",),
    )
    samples: int = option(128, "calibration sequences", "--calibration-samples", least=1)
    damp: float = option(0.01, "GPTQ damping, as a fraction of the mean diagonal of the Hessian", "--damp", least=0.0)


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tuning through the grid."""

    mode: str | None = option(
        None,
        "what trains: all weights, LoRA inside the quantizer, or scales and norms; default: full below 1 B parameters, "
        "else lora",
        "--train",
        choices=MODES,
    )
    loss: str = option("kd", "distil from the float model, or cross-entropy on the text", "--loss", choices=LOSSES)
    hidden_weight: float = option(
        10.0,
        "kd: weight of the relative squared error of hidden states; 0 leaves the KL divergence alone",
        "--hidden-weight",
        least=0.0,
    )
    max_steps: int = option(500, "optimizer steps", "--max-steps", least=1)
    batch_size: int = option(4, "sequences per step and process, before accumulation", "--batch-size", least=1)
    accumulation: int = option(1, "batches summed into one step", "--accumulation", least=1)
    length: int = option(512, "tokens per training sequence", "--length", least=8)
    lr: float | None = option(
        None,
        "learning rate; full: in codes per step, lora: of the adapters, scales: as a fraction of the scale",
        "--lr",
        least=0.0,
    )
    lr_scale: float = option(
        0.0,
        "full: learning rate of the scales, as a fraction of the scale; 0 leaves them as they were initialized",
        "--lr-scale",
        least=0.0,
    )
    lr_float: float = option(
        1e-3, "learning rate of norms and embeddings, as a fraction of their RMS", "--lr-float", least=0.0
    )
    lora_r: int = option(32, "LoRA rank", "--lora-r", least=1)
    warmup: float = option(
        0.05, "share of the steps with rising learning rate; then cosine to zero", "--warmup", least=0.0, most=1.0
    )
    optimizer: str = option(
        "adamw",
        "8 bit: a quarter of the optimizer's memory; paged: what does not fit a CUDA device goes to the CPU; both by "
        "bitsandbytes",
        "--optimizer",
        choices=OPTIMIZERS,
    )
    max_grad_norm: float = option(1.0, "gradient clipping", "--max-grad-norm", least=0.0)
    precision: str = option("bf16", "compute precision; masters are float32 always", "--precision", choices=PRECISIONS)
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, slower", "--gradient-checkpointing"
    )
    eval_every: int = option(100, "steps between held-out losses; the best state is kept", "--eval-every", least=1)
    freeze_observers: int = option(
        100, "steps after which the ranges of static activations stay as they are", "--freeze-observers", least=0
    )
    save_every: int = option(100, "steps between checkpoints", "--save-every", least=1)
    tracker: str | None = option(None, "accelerate tracker for curves", "--tracker", choices=("tensorboard", "wandb"))


@dataclass(frozen=True)
class DataConfig:
    """Text or conversations to train and measure on."""

    dataset: str = option(
        "stdlib",
        "Hub id (name or name:config), .txt/.jsonl/.json/.parquet/.csv file, directory of them, wikitext2, c4, c4-new, "
        "ptb or ptb-new (scored as papers do), or stdlib: the source text of this Python's standard library",
        "--dataset",
    )
    text_field: str = option("text", "column that holds the text", "--text-field")
    rows: str = option(
        "auto",
        "chat: conversations (messages, prompt/completion, instruction/output) through the chat template, with loss on "
        "the answers only; text: the column of --text-field; auto: chat where the columns look like it",
        "--rows",
        choices=ROWS,
    )
    streaming: bool = option(
        False, "read a Hub dataset as a stream: its first rows, shuffled, without downloading the rest", "--streaming"
    )
    max_rows: int | None = option(
        None, "rows to read of each file or split at most; default: all, 20000 with --streaming", "--max-rows", least=1
    )
    calibration: str | None = option(None, "calibrate on this dataset instead of the training text", "--calibration")


@dataclass(frozen=True)
class EvalConfig:
    """What is measured, and how."""

    window: int = option(512, "tokens per perplexity window; windows do not overlap", "--window", least=2)
    tokens: int = option(65536, "test tokens at most", "--eval-tokens", least=2)
    validation_tokens: int = option(16384, "held-out tokens that choose the best state", "--validation-tokens", least=2)
    bos: str = option(
        "stream",
        "BOS once before the stream, before every window, as the tokenizer has it, or none",
        "--bos",
        choices=BOS_RULES,
    )
    prompt: int = option(256, "tokens of the prompt in the throughput measurement", "--prompt-tokens", least=1)
    new_tokens: int = option(64, "tokens generated in it", "--new-tokens", least=1)
    control: bool = option(
        False,
        "also train the float model on the same tokens, to tell learning the text from learning the grid",
        "--control",
    )
    repeats: int = option(5, "repetitions of it; 0 leaves throughput out", "--repeats", least=0)


@dataclass(frozen=True)
class Recipe:
    """One run, from the float model to the packed file."""

    model: str = option("llama", "Hub id, local directory, or llama: the small Llama inside this package", "--model")
    output: str = option("runs/llmqat", "directory to write", "--output")
    seed: int = option(0, "order of the data, initial adapters", "--seed", least=0)
    quant: QuantConfig = field(default_factory=QuantConfig)
    init: InitConfig = field(default_factory=InitConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def scheme(self) -> QuantScheme:
        """The grid of every layer that no override touches; `group_size` must be resolved."""
        q = self.quant
        assert q.group_size is not None
        return QuantScheme(q.bits, q.group_size, q.symmetric, q.act_bits, q.act_static)

    def to_dict(self) -> dict[str, Any]:
        """Plain nested values."""
        return asdict(self)

    def with_values(self, values: Mapping[str, Any]) -> "Recipe":
        """A copy with dotted keys set: ``{"quant.bits": 3, "model": "llama"}``; checked like YAML."""
        nested: dict[str, Any] = self.to_dict()
        for dotted, value in values.items():
            *path, key = dotted.split(".")
            section = nested
            for name in path:
                section = section[name]
            section[key] = value
        return from_dict(nested)


def from_dict(values: Mapping[str, Any]) -> Recipe:
    """A recipe from nested plain values; missing keys take their defaults.

    Raises:
        LlmqatError: for an unknown key, a wrong type or a value out of range, naming the key and the remedy.
    """
    recipe = _section(Recipe, values, "")
    assert isinstance(recipe, Recipe)
    QuantScheme(
        recipe.quant.bits,
        recipe.quant.group_size or 128,
        recipe.quant.symmetric,
        recipe.quant.act_bits,
        recipe.quant.act_static,
    )
    if recipe.quant.group_size == 0:
        raise LlmqatError("quant.group_size must be positive, or -1 for one group per row; got 0")
    return recipe


def from_yaml(path: Path) -> Recipe:
    """A recipe from a YAML file of differences.

    Raises:
        LlmqatError: if the file is missing, is not YAML, or holds a bad key or value.
    """
    import yaml

    try:
        values = yaml.safe_load(path.read_text("utf-8"))
    except OSError as error:
        raise LlmqatError(
            f"cannot read recipe {path}: {error.strerror}; `llmqat recipes` lists the bundled ones"
        ) from error
    except yaml.YAMLError as error:
        raise LlmqatError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is not None and not isinstance(values, dict):
        raise LlmqatError(f"{path} must hold `key: value` lines, got {type(values).__name__}")
    try:
        return from_dict(values or {})
    except LlmqatError as error:
        raise LlmqatError(f"{path}: {error}") from error


def to_yaml(recipe: Recipe) -> str:
    """The fully resolved recipe."""
    import yaml

    return str(yaml.safe_dump(recipe.to_dict(), sort_keys=False))


def _section(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    known = {f.name: f for f in fields(cls)}
    hints = get_type_hints(cls)
    chosen: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            close = get_close_matches(str(key), known, n=1, cutoff=0.5)
            remedy = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(known)}"
            raise LlmqatError(f"unknown key {prefix}{key}; {remedy}")
        if is_dataclass(hints[key]):
            if not isinstance(value, Mapping):
                raise LlmqatError(f"{prefix}{key} is a section: write its keys below it, indented; got {value!r}")
            chosen[key] = _section(hints[key], value, f"{prefix}{key}.")
        else:
            chosen[key] = _value(hints[key], value, f"{prefix}{key}", known[key].metadata)
    return cls(**chosen)


def _value(hint: Any, value: Any, name: str, metadata: Mapping[str, Any]) -> Any:
    if (value is None and type(None) in get_args(hint)) or value in metadata["words"]:
        return value
    hint = next(a for a in get_args(hint) if a is not type(None)) if _is_union(hint) else hint
    wanted = get_origin(hint) or hint
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        words = "".join(f" or {word}" for word in metadata["words"])
        raise LlmqatError(f"{name} must be {_english(wanted)}{words}, got {value!r}{_number_hint(wanted, value)}")
    if metadata["choices"] and value not in metadata["choices"]:
        raise LlmqatError(f"{name} must be one of {', '.join(map(str, metadata['choices']))}; got {value!r}")
    if metadata["least"] is not None and not value >= metadata["least"]:
        raise LlmqatError(f"{name} must be at least {metadata['least']:g}, got {value!r}")
    if metadata["most"] is not None and not value <= metadata["most"]:
        raise LlmqatError(f"{name} must be at most {metadata['most']:g}, got {value!r}")
    return value


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _english(wanted: type) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "a mapping"}
    return names[wanted]


def _number_hint(wanted: type, value: Any) -> str:
    """YAML 1.1 reads 2e-4 as text: say what to write."""
    if wanted is not float or not isinstance(value, str):
        return ""
    try:
        number = float(value)
    except ValueError:
        return ""
    mantissa, _, exponent = f"{number:e}".partition("e")
    return f" (text, to YAML); write {float(mantissa)}e{int(exponent):+d}"


def resolve(recipe: Recipe, parameters: int) -> Recipe:
    """Fill in what depends on the size of the model, so that the saved recipe leaves nothing open."""
    quant, train = recipe.quant, recipe.train
    if quant.group_size is None:
        quant = replace(quant, group_size=32 if parameters < 2e9 else 128)
    mode = train.mode or ("full" if parameters < 1e9 else "lora")
    lr = train.lr if train.lr is not None else DEFAULT_LR[mode]
    return replace(recipe, quant=quant, train=replace(train, mode=mode, lr=lr))


DEFAULT_LR = {"full": 5e-3, "lora": 3e-3, "scales": 3e-3}
