"""The inputs of a run besides its model: dataset, tokens to train, score and calibrate on, and hashes."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmqat.config import DEFAULT_BOS, DataConfig, EvalConfig, Resolved
from llmqat.data.corpus import Corpus, load_corpus
from llmqat.data.messages import Document
from llmqat.data.named_sets import PUBLISHED_WINDOW, check_options, named_set
from llmqat.data.tokens import encode, opening_of, sequences, split_stream
from llmqat.errors import LlmqatError
from llmqat.formats.weights import read_tensors
from llmqat.metrics.perplexity import Windows, windows
from llmqat.metrics.published import scored_windows
from llmqat.models.coverage import CoverageReport
from llmqat.models.foreign import local_directory
from llmqat.processes import process_count
from llmqat.progress import log
from llmqat.train.state import hash_of_tensor, hash_of_tensors

CALIBRATION_BATCH = 8
# Calibration sequences are drawn from so many tokens of the training text, whatever else the run does.
CALIBRATION_TOKENS = 8_000_000
# Text is tokenized up to this many tokens, or as many as the run trains on if that is more.
LEAST_TRAIN_TOKENS = 8_000_000


@dataclass(frozen=True)
class Inputs:
    """All tokens of a run.

    Attributes:
        test: windows that are scored.
        also: those of other texts, by dataset.
        validation: sequences that choose the best state; None without training.
        training: sequences to train on, see `llmqat.sequences`; None without training.
        calibration: batches ``(batch, length)``; empty where nothing is calibrated.
    """

    test: Windows
    also: Mapping[str, Windows] = field(default_factory=dict)
    validation: Windows | None = None
    training: Tensor | None = None
    calibration: tuple[Tensor, ...] = ()

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each kind of tokens, by its name in words."""
        found = {"test tokens": self.test.sha256}
        found |= {f"test tokens of {name}": windows.sha256 for name, windows in self.also.items()}
        if self.calibration:
            found["calibration tokens"] = hash_of_tensor(*self.calibration)
        if self.validation is not None and self.training is not None:
            found["validation tokens"] = self.validation.sha256
            found["training tokens"] = hash_of_tensor(self.training)
        return found


def calibrates(recipe: Resolved, coverage: CoverageReport) -> bool:
    """Whether a run needs calibration data: for GPTQ and what follows it, SmoothQuant, static activation ranges, or
    other tools."""
    static = any(layer.scheme is not None and layer.scheme.inputs == "static" for layer in coverage.quantized)
    by_others = bool(recipe.eval.other_tools)
    return recipe.init.by_blocks or recipe.init.smooth is not None or static or by_others


def tokenized(recipe: Resolved, tokenizer: Any, corpus: Corpus, coverage: CoverageReport, train: bool) -> Inputs:
    """All tokens of a run.

    Args:
        recipe: of the run.
        tokenizer: of its model.
        corpus: its dataset.
        coverage: its plan, which says whether anything is calibrated.
        train: whether it trains.

    Raises:
        LlmqatError: if a text is too short, or a calibration dataset cannot be had.
    """
    limits = recipe.eval.window, recipe.eval.tokens, recipe.eval.bos
    inputs = Inputs(
        scored_windows(recipe.data.dataset, tokenizer, *limits, corpus.test), other_texts(recipe, tokenizer)
    )
    if calibrates(recipe, coverage):
        inputs = replace(inputs, calibration=tuple(calibration(recipe, tokenizer, corpus.train)))
    if not train:
        return inputs
    name, length, bos = recipe.data.dataset, recipe.data.length, recipe.eval.bos
    held_out = recipe.eval.validation_tokens
    return replace(
        inputs,
        validation=windows(tokenizer, corpus.validation, length, held_out, bos, f"{name} evaluation"),
        training=sequences(tokenizer, corpus.train, length, train_tokens(recipe), f"{name} training", bos),
    )


def other_texts(recipe: Resolved, tokenizer: Any) -> dict[str, Windows]:
    """Windows of the test text of each dataset of ``--also``, cut as those of the run are.

    Raises:
        LlmqatError: if one is the dataset of the run, cannot be had, or is too short.
    """
    limits, found = (recipe.eval.window, recipe.eval.tokens, recipe.eval.bos), {}
    for name in recipe.eval.other_texts:
        if name == recipe.data.dataset:
            raise LlmqatError(f"--also {name} is the dataset of the run, which is scored already; name another")
        documents = None if named_set(name) is not None else read(recipe.data, name).test
        found[name] = scored_windows(name, tokenizer, *limits, documents)
    return found


def read(data: DataConfig, dataset: str) -> Corpus:
    """Documents of a dataset, by the recipe's options; a local or named one beside the main one is not streamed."""
    other = Path(dataset).exists() or named_set(dataset) is not None
    streaming = data.streaming and (dataset == data.dataset or not other)
    return load_corpus(dataset, data.text_field, data.rows, streaming, data.max_rows)


def train_tokens(recipe: Resolved) -> int:
    """How much of the training text is tokenized: enough for the run, and at least `LEAST_TRAIN_TOKENS`."""
    config = recipe.train
    count = config.max_steps * config.batch_size * config.accumulation * process_count()
    return max(count * recipe.data.length, LEAST_TRAIN_TOKENS)


def calibration(recipe: Resolved, tokenizer: Any, documents: Sequence[Document] | None = None) -> list[Tensor]:
    """Batches ``(batch, length)`` of sequences drawn by the seed, the same for every way of quantizing.

    Args:
        recipe: names the dataset, how many sequences are drawn, and the seed.
        tokenizer: of the model.
        documents: training text of the recipe's dataset, where that has been read.
    """
    source = recipe.data.calibration
    if source is not None or documents is None:
        documents = read(recipe.data, source or recipe.data.dataset).train
    stream, opening = encode(tokenizer, documents, CALIBRATION_TOKENS), opening_of(tokenizer, recipe.eval.bos)
    found = split_stream(stream, recipe.data.length, "calibration", opening)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(recipe.seed))[: recipe.init.samples]
    size = min(CALIBRATION_BATCH, len(order))
    return list(found[order[: len(order) // size * size]].split(size))


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 of all tensors of a model: names, dtypes, shapes and values."""
    return hash_of_tensors({name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, Tensor)})


def hash_of_files(directory: str) -> str:
    """SHA-256 of all tensors in the files of a model directory."""
    return hash_of_tensors(dict(read_tensors(local_directory(directory))))


def hash_of_tokenizer(tokenizer: Any) -> str:
    """SHA-256 of what a tokenizer makes of texts and conversations: vocabulary, rules, special tokens, template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    told = [rules, special, getattr(tokenizer, "chat_template", None)]
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()


def eval_windows(
    data: DataConfig, tokenizer: Any, context: int | None, window: int | None, max_tokens: int | None, bos: str | None
) -> Windows:
    """The windows that `llmqat eval` scores; of a named set, only what papers score is downloaded.

    Args:
        data: dataset, and how its rows are read.
        tokenizer: of the model.
        context: tokens the model can see; None if it does not say.
        window: None: 512; of a named set what papers take, as far as the context allows.
        max_tokens: None: 65,536; of a named set all that papers score.
        bos: None: once before the stream; of a named set as the tokenizer has it.
    """
    known = named_set(data.dataset)
    if known is None:
        documents = read(data, data.dataset).test
        limits = window or EvalConfig.window, max_tokens or EvalConfig.tokens
        return scored_windows(data.dataset, tokenizer, *limits, bos or DEFAULT_BOS, documents)
    check_options(data.dataset, data.streaming, data.rows)
    if window is None and context is not None and context < PUBLISHED_WINDOW:
        log(f"the model's context is {context} tokens: windows are cut to it; papers take {PUBLISHED_WINDOW}")
    window = window or min(PUBLISHED_WINDOW, context or PUBLISHED_WINDOW)
    return scored_windows(data.dataset, tokenizer, window, max_tokens, bos or "tokenizer")
