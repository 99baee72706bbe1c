"""`llmqat verify OUT --against DIR --runtime ENGINE`: an engine says of OUT what `llmqat.load` says of DIR.

How far it may be from that is measured, too: by what the packed model itself loses in the engine's arithmetic. In
float32 that is its distance from float64, in 16 bits from float32; for formats of codes and scales, with their products
as those engines have them, which do not round them to the dtype of the scales as training does. Where one of the two
rounds activations to int8 and the other does not, its distance from itself with the other activations is added.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.formats.dense import dense_copy, quantizes_inputs
from llmqat.formats.export.compare import format_of
from llmqat.formats.reader import load_packed
from llmqat.models.foreign import local_directory
from llmqat.models.loading import load_tokenizer
from llmqat.nn.packed_linear import PackedLinear
from llmqat.pipeline.engines.table import ENGINES
from llmqat.pipeline.engines.torch_model import TorchModel
from llmqat.pipeline.passages import Passages
from llmqat.pipeline.run_engine import run_engine
from llmqat.quant.full_float32 import full_float32

# KL grows with the square of an error: the bound is four times the error of the packed model itself.
BOUND = 16


class Distance(NamedTuple):
    """How far log-probabilities are from others.

    Attributes:
        max_error: largest difference of one.
        kl: mean over tokens, in nats.
        top1: share of tokens where the likeliest one is the same.
    """

    max_error: float
    kl: float
    top1: float

    @classmethod
    def of(cls, right: list[Tensor], found: list[Tensor]) -> Self:
        """Distance of `found` from `right`, a tensor ``(tokens, vocabulary)`` each passage.

        ``KL = sum_v p_v (d_v + exp(-d_v) - 1)`` where ``d = log p - log q``: the last two terms sum to nothing, and
        make every term positive, so that rounding does not show.
        """
        p, q = torch.cat(right).double(), torch.cat(found).double()
        if p.shape != q.shape:
            raise LlmqatError(
                f"the engine knows {q.shape[1]} words, and the packed model {p.shape[1]}; export that again"
            )
        d = p - q
        kl = (p.exp() * (d + (-d).expm1())).sum(-1).mean()
        return cls(float(d.abs().max()), float(kl), float((p.argmax(-1) == q.argmax(-1)).double().mean()))


@dataclass(frozen=True)
class RuntimeCheck:
    """Outcome of `verify_runtime`.

    Attributes:
        runtime: the engine.
        versions: of its packages.
        format: of the model that it ran.
        dtype: it computed in.
        int8: whether it rounded activations to int8.
        passages: of text that were compared.
        tokens: in them.
        same_ids: passages that both cut into the same tokens.
        same_greedy: prompts that both continue by the same tokens, with their caches.
        tokens_s: tokens a second of the engine's continuations, with the prompts before them, median.
        gap: how much less likely than the likeliest one a token of the engine's continuations is at most, by the packed
            model, in nats.
        gap_bound: twice the largest error: what may exchange two tokens.
        max_error: largest difference of a log-probability.
        kl: of the engine from the packed model, mean over tokens, in nats.
        kl_bound: that of the packed model in the engine's arithmetic, at four times the error.
        top1: share of tokens where both have the same likeliest next one.
    """

    runtime: str
    versions: dict[str, str]
    format: str
    dtype: str
    int8: bool
    passages: int
    tokens: int
    same_ids: int
    same_greedy: int
    tokens_s: float
    gap: float
    gap_bound: float
    max_error: float
    kl: float
    kl_bound: float
    top1: float

    @property
    def ok(self) -> bool:
        """Whether the engine runs the packed model."""
        return not self.problems()

    def problems(self) -> list[str]:
        """Differences from the packed model that are too large, each in a few words."""
        found = []
        if self.same_ids < self.passages:
            found.append(f"{self.runtime} cuts {self.passages - self.same_ids} passages into other tokens")
        if not self.kl <= self.kl_bound:
            found.append(f"{self.runtime} has a KL of {self.kl:.1e} from it, and {self.kl_bound:.1e} is allowed")
        if not self.gap <= self.gap_bound:
            found.append(
                f"{self.runtime} continues by a token {self.gap:.2g} nats below the likeliest, and "
                f"{self.gap_bound:.2g} is allowed"
            )
        return found

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {found}" for name, found in self.versions.items())
        int8 = " and int8 activations" if self.int8 else ""
        return (
            f"runtime          {versions}, in {self.dtype}{int8}\n"
            f"same tokens      {self.same_ids} of {self.passages} passages, {self.tokens} tokens\n"
            f"same greedy      {self.same_greedy} of {self.passages}\n"
            f"tokens/s         {self.tokens_s:.1f}\n"
            f"greedy gap       {self.gap:.2e}\n"
            f"gap bound        {self.gap_bound:.2e}\n"
            f"max error        {self.max_error:.2e}\n"
            f"KL               {self.kl:.2e}\n"
            f"KL bound         {self.kl_bound:.2e}\n"
            f"top-1            {self.top1:.1%}"
        )


@full_float32()
def verify_runtime(
    directory: str | Path, against: str | Path, runtime: str, text: str | None = None, python: str = sys.executable
) -> RuntimeCheck:
    """Compare a model in an engine with its packed directory in llmqat: next tokens of a text, greedy continuations.

    Args:
        directory: the output of `export`, or a packed directory.
        against: the packed directory it was made of, or its Hub id.
        runtime: the engine, a name of `ENGINES`.
        text: file whose passages are compared; None for the text inside this package.
        python: of the environment that has the engine.

    Raises:
        LlmqatError: see `format_of`, `Passages.of` and `run_engine`.
    """
    packed, engine = local_directory(against), ENGINES[runtime]
    held_as = format_of(Path(directory))
    tokenizer, dtype = load_tokenizer(str(packed)), getattr(torch, engine.dtype(held_as))
    ours = load_packed(packed, dtype)
    limit = getattr(ours.config.get_text_config(), "max_position_embeddings", None)
    passages = Passages.of(text, tokenizer, limit)
    ran = run_engine(runtime, Path(directory), held_as, passages, python)
    right = [log_probabilities(ours, ids) for ids in passages.ids]
    found = Distance.of(right, ran.log_probabilities)
    prompts = [ids[: passages.prompt] for ids in passages.ids]
    gaps = [gap(ours, prompt, new) for prompt, new in zip(prompts, ran.greedy, strict=True)]
    own = [TorchModel(ours).greedy(prompt, passages.new) for prompt in prompts]
    arithmetic = dtype, engine.rounds or held_as == "dense", engine.int8
    lost = sum(Distance.of(right, other).kl for other in other_arithmetic(packed, passages, *arithmetic))
    return RuntimeCheck(
        runtime=runtime,
        versions=ran.versions,
        format=held_as,
        dtype=engine.dtype(held_as),
        int8=engine.int8,
        passages=len(passages.ids),
        tokens=sum(map(len, passages.ids)),
        same_ids=sum(a == tokenizer(b)["input_ids"] for a, b in zip(ran.ids, passages.texts, strict=True)),
        same_greedy=sum(a == b for a, b in zip(own, ran.greedy, strict=True)),
        tokens_s=ran.tokens_s,
        gap=max(gaps),
        gap_bound=2 * found.max_error,
        max_error=found.max_error,
        kl=found.kl,
        kl_bound=BOUND * lost,
        top1=found.top1,
    )


def log_probabilities(model: Any, ids: list[int]) -> Tensor:
    """Log-probabilities of the next tokens behind all ids but the last, in float32, as engines give theirs."""
    return torch.from_numpy(TorchModel(model).log_probabilities(ids))


def gap(model: Any, prompt: list[int], new: list[int]) -> float:
    """How much less likely than the likeliest one a token of a continuation is at most, in nats."""
    behind = log_probabilities(model, prompt + new)[len(prompt) - 1 :]
    return float((behind.amax(-1) - behind.gather(-1, torch.tensor(new)[:, None])[:, 0]).max())


def other_arithmetic(
    packed: Path, passages: Passages, dtype: torch.dtype, rounds: bool, int8: bool
) -> Iterator[list[Tensor]]:
    """Log-probabilities of the packed model in a wider dtype, its products of codes and scales rounded or not; and with
    the activations of the engine, where those are not the ones it was trained with."""
    wider = load_packed(packed, torch.float32, native=False)
    trained_int8 = quantizes_inputs(wider)
    if not rounds:
        leave_products(wider)
    if dtype == torch.float32:
        wider = dense_copy(wider, torch.float64)
    yield [log_probabilities(wider, ids) for ids in passages.ids]
    if int8 or trained_int8:
        model = load_packed(packed, dtype, native=False)
        exchange_activations(model)
        yield [log_probabilities(model, ids) for ids in passages.ids]


def leave_products(model: Any) -> None:
    """Leave products of codes and scales unrounded, as engines do that are given codes and scales; training rounds them
    to the dtype of the scales."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.weight_scale = layer.weight_scale.float()


def exchange_activations(model: Any) -> None:
    """Let layers that were trained with float activations round them to int8, and the others leave them float."""
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            act_bits = 8 if layer.scheme.inputs == "float" else None
            layer.scheme, layer.input_scale = replace(layer.scheme, act_bits=act_bits, act_static=False), None
