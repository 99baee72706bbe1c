"""The sections of a recipe, as dataclasses: every choice of a run.

One source for the YAML keys, the command-line flags and their help: the `option` of each field. The class attributes
are the defaults: `EvalConfig.window`.
"""

import sys
from dataclasses import dataclass, field
from typing import Any

from llmqat.config.options import meta, option
from llmqat.errors import LlmqatError
from llmqat.scheme import BITS, SCALE_DTYPES, QuantScheme

INITS = ("gptq", "blockwise", "rtn")
MODES = ("full", "lora", "scales")
LOSSES = ("kd", "ce")
OBSERVERS = ("minmax", "moving_average", "percentile", "mse")
PRECISIONS = ("bf16", "fp32")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
ROWS = ("auto", "text", "chat")
BASELINES = ("auto-round", "llm-compressor")
BOS_RULES = ("stream", "window", "tokenizer", "none")


@dataclass(frozen=True)
class QuantConfig:
    """The grid."""

    bits: int = option(4, "bits per weight", "--bits", choices=BITS)
    average_bits: float | None = option(
        None,
        "measure what each layer loses at fewer bits, and give it 4 or 8, below an average of 4 also 3 or 2, so that "
        "it is this many bits a weight on average; in place of --bits",
        "--average-bits",
        least=float(BITS[0]),
        most=float(BITS[-1]),
    )
    group_size: int | None = option(
        None,
        "weights per scale; -1: one per row; default: 128, or 64 or 32 where 128 does not divide every row",
        "--group-size",
    )
    symmetric: bool = option(True, "signed codes without zero point, which every serving format takes without loss")
    act_bits: int | None = option(None, "8: int8 activations, per token and dynamic", "--act-bits", choices=(8,))
    act_static: bool = option(False, "int8 activations with one observed scale for each layer", "--act-static")
    observer: str = option("mse", "how the ranges of static activations are found", "--observer", choices=OBSERVERS)
    scale_dtype: str | None = option(
        None,
        "float16: scales that float16 holds exactly, whatever dtype they are stored in, for formats such as GGUF",
        "--scale-dtype",
        choices=SCALE_DTYPES,
    )
    serve_with: str | None = option(
        None,
        "engines and formats, separated by commas, that have to hold the grid: vllm, gguf, awq, mlx and others",
        "--serve-with",
    )
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

    def __post_init__(self) -> None:
        """Check what the fields say together: what `QuantScheme` refuses is refused before anything is loaded."""
        group_size = -1 if self.group_size is None else self.group_size
        QuantScheme(self.bits, group_size, self.symmetric, self.act_bits, self.act_static, self.scale_dtype)

    @property
    def served_with(self) -> tuple[str, ...]:
        """The engines and formats that have to hold the grid."""
        return () if self.serve_with is None else tuple(name.strip() for name in self.serve_with.split(","))


@dataclass(frozen=True)
class InitConfig:
    """Where training starts: post-training quantization."""

    method: str = option(
        "gptq",
        "initial codes: GPTQ; blockwise: GPTQ, then codes and scales of each block trained to its float output, which "
        "takes longer and is nearer to the float model; rtn: round to nearest",
        "--init",
        choices=INITS,
    )
    codes_from: str | None = option(
        None,
        "start from the codes and scales of this packed directory, on its grid, in place of --init; --model is the "
        "float model that it was made of; llmqat import makes one of GPTQ, AWQ and GGUF files",
        "--codes-from",
    )
    block_steps: int = option(200, "blockwise: training steps for each block", "--block-steps", least=1)
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

    @property
    def by_blocks(self) -> bool:
        """Whether codes are found block by block on calibration data."""
        return self.method != "rtn" and self.codes_from is None

    @property
    def variant(self) -> str:
        """The start of training, as the scoreboard names it."""
        return self.method if self.codes_from is None else "given"


@dataclass(frozen=True)
class TrainConfig:
    """Fine-tuning through the grid."""

    mode: str | None = option(
        None,
        "what trains: all weights, LoRA inside the quantizer with scales and norms, or these alone; default: "
        "full below 1 B parameters and without --low-memory, else lora",
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
    lr: float | None = option(
        None,
        "learning rate; full: in codes per step, lora: of the adapters, scales: as a fraction of the scale; default: "
        "3e-3; full: 2e-3",
        "--lr",
        least=0.0,
    )
    lr_scale: float | None = option(
        None,
        "full, lora: learning rate of the scales, as a fraction of the scale; 0 leaves them as they were initialized; "
        "default: 1e-3 for full, 3e-3 for lora",
        "--lr-scale",
        least=0.0,
    )
    lr_float: float = option(
        1e-3,
        "learning rate of norms and, where all weights train, embeddings, as a fraction of their RMS",
        "--lr-float",
        least=0.0,
    )
    lora_r: int = option(32, "lora: rank of the adapters", "--lora-r", least=1)
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
    compile: bool = option(
        False,
        "run decoder blocks through torch.compile, for GPUs, after minutes of compiling; on a CPU it turns off the "
        "kernels that do more",
        "--compile",
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
    length: int = option(512, "tokens per training and calibration sequence", "--length", least=8)
    streaming: bool = option(
        False, "read a Hub dataset as a stream: its first rows, shuffled, without downloading the rest", "--streaming"
    )
    max_rows: int | None = option(
        None, "rows to read of each file or split at most; default: all, 20000 with --streaming", "--max-rows", least=1
    )
    calibration: str | None = option(None, "calibrate on this dataset instead of the training text", "--calibration")


@dataclass(frozen=True)
class EvalConfig:
    """Test tokens, scoring and speed measurement."""

    window: int = option(512, "tokens per perplexity window; windows do not overlap", "--window", least=2)
    tokens: int = option(65536, "test tokens at most", "--eval-tokens", least=2)
    also: str | None = option(
        None,
        "score these datasets too, names separated by commas: what was learned of other text than that of --dataset",
        "--also",
    )
    validation_tokens: int = option(16384, "held-out tokens that choose the best state", "--validation-tokens", least=2)
    bos: str | None = option(
        None,
        "BOS once before the stream, before every window, as the tokenizer has it, or none; window also opens every "
        "sequence that calibrates or trains; default: window for Gemma, which needs it, else stream",
        "--bos",
        choices=BOS_RULES,
    )
    prompt: int = option(256, "tokens of the prompt in the throughput measurement", "--prompt-tokens", least=1)
    new_tokens: int = option(64, "tokens generated in it", "--new-tokens", least=1)
    baselines: str | None = option(
        None,
        "also let other tools quantize the float model, on the same grid and calibration tokens, and score that: "
        f"{', '.join(BASELINES)}, separated by commas; NAME=PYTHON for one that is installed in another environment",
        "--baselines",
    )
    control: bool = option(
        False,
        "also train the float model on the same tokens, to tell learning the text from learning the grid",
        "--control",
    )
    repeats: int = option(5, "repetitions of it; 0 leaves throughput out", "--repeats", least=0)

    @property
    def other_texts(self) -> tuple[str, ...]:
        """The datasets that are scored beside the one of the run."""
        return () if self.also is None else tuple(name.strip() for name in self.also.split(","))

    @property
    def other_tools(self) -> dict[str, str]:
        """The tools that the run is compared with -> the Python that has them."""
        pairs = [] if self.baselines is None else [tool.strip().partition("=") for tool in self.baselines.split(",")]
        return {name: python or sys.executable for name, _, python in pairs}

    def __post_init__(self) -> None:
        """Refuse names that are empty, unknown or given twice."""
        tools = self.other_tools
        twice = self.baselines is not None and self.baselines.count(",") + 1 > len(tools)
        if twice or not set(tools) <= set(BASELINES):
            known = ", ".join(BASELINES)
            raise LlmqatError(f"--baselines takes {known}, each once, separated by commas; got {self.baselines!r}")
        names = self.other_texts
        if not all(names) or len(set(names)) < len(names):
            raise LlmqatError(f"--also takes datasets, each once, separated by commas; got {self.also!r}")
