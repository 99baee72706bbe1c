"""The output head of a causal language model run apart from its blocks, so that logits exist a few tokens at a time.

With a vocabulary of 262,144 words the logits of 4,096 tokens are 4 GiB in float32, and their softmax as much again;
the hidden states that they come from are a few MiB.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from llmqat.kernels import products
from llmqat.nn.fake_quant_linear import FakeQuantLinear
from llmqat.nn.widened import WidenedLinear
from llmqat.progress import log
from llmqat.quant.fake_quant import compute_dtype
from llmqat.quant.grid import slices

CHUNK_LOGITS = 2**24  # numbers in the logits of a chunk: 64 MiB in float32
CACHED_LOGITS = 2**18  # and in those of a few of its tokens: 1 MiB, so that what is computed of them stays in the cache
TILE_ROWS = 32  # tokens that kernels multiply at once


def soft_capped(logits: Tensor, cap: float) -> Tensor:
    """``cap * tanh(logits / cap)`` (Gemma 2, arXiv:2408.00118, section 2)."""
    return torch.tanh(logits / cap) * cap


# `linear` of torch, or one that takes the same.
Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]

# What a model's forward does to the logits after its output head, by the entry of its config that says so.
AFTER_HEAD: dict[str, Callable[[Tensor, float], Tensor]] = {
    "final_logit_softcapping": soft_capped,  # Gemma 2, Gemma 3
    "logits_scaling": torch.div,  # Granite
    "logit_scale": torch.mul,  # Cohere
}


def cached(logits: Tensor) -> Iterator[slice]:
    """Slices of few rows of ``(tokens, V)``, small enough for the cache of a CPU; elsewhere all of them."""
    tokens, vocabulary = logits.shape
    few = max(1, CACHED_LOGITS // vocabulary) if logits.device.type == "cpu" else tokens
    return slices(tokens, few)


class HeadWeights(NamedTuple):
    """Weights of a head that is a Linear and nothing else, in the dtype in which it computes."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class BelowHead:
    """A forward that stopped below the output head.

    Attributes:
        outputs: of the model; where the head ran apart, its logits are those of the first token only.
        hidden: input of the head ``(batch, length, hidden)``; or the logits themselves, if `logits` is the identity.
        logits: maps ``(tokens, hidden)`` to logits ``(tokens, vocabulary)``.
        vocabulary: logits of a token.
        parameters: those of the head that train.
        weights: of a head whose logits are a product of matrices, in the dtype asked for; None where they are not.
    """

    outputs: Any
    hidden: Tensor
    logits: Callable[[Tensor], Tensor]
    vocabulary: int
    parameters: tuple[nn.Parameter, ...] = ()
    weights: Callable[[torch.dtype], HeadWeights] | None = None

    def chunks(self, tokens: int) -> Iterator[slice]:
        """Slices of `tokens` tokens, each of so many that their logits are few; about equal, since one of a few tokens
        would pass over the whole head like the others."""
        most = max(1, CHUNK_LOGITS // self.vocabulary)
        count = math.ceil(tokens / most) or 1
        equal = math.ceil(tokens / count) or 1
        whole_tiles = math.ceil(equal / TILE_ROWS) * TILE_ROWS
        size = whole_tiles if whole_tiles <= most else equal
        return (slice(start, start + size) for start in range(0, tokens, size))


class CastWeight:
    """A frozen weight in the dtype that a head computes in, cast once a forward, not for every chunk of tokens."""

    def __init__(self) -> None:
        self.cast: Tensor | None = None

    def __call__(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """`weight` in `dtype`, as it was when it was first asked for since `forget`."""
        if self.cast is None:
            self.cast = weight.detach().to(dtype)
        return self.cast

    def forget(self) -> None:
        """Let go of the cast, since the weight may change."""
        self.cast = None


def is_linear(layer: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a layer is a Linear and nothing else."""
    return type(layer) in (nn.Linear, WidenedLinear)


def trained(layer: nn.Module) -> tuple[nn.Parameter, ...]:
    """Parameters of a layer that train."""
    return tuple(parameter for parameter in layer.parameters() if parameter.requires_grad)


class OutputHead:
    """Runs a causal language model without its output head, where that gives the same logits.

    The first forward compares the logits of one token with those of the model itself. Where they differ, or the model
    has no head of its own, forwards are whole.

    Args:
        model: as transformers made it, with quantized layers or without, not wrapped for several processes.
        apart: False leaves all forwards whole: for a head whose weights are split over processes.
    """

    def __init__(self, model: nn.Module, apart: bool = True) -> None:
        find = getattr(model, "get_output_embeddings", None)
        layer = find() if apart and find is not None else None
        self.layer: nn.Module | None = None if layer is None or follows_inputs(layer) else layer
        config: Any = getattr(model, "config", None)
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        values = {name: getattr(text, name, None) for name in AFTER_HEAD}
        self.after = [(AFTER_HEAD[name], value) for name, value in values.items() if value is not None]
        self.compared = False
        self.cast_weight = CastWeight()

    def share_cast(self, other: "OutputHead") -> None:
        """Cast the weight once for this head and another, if they are one layer."""
        if self.layer is other.layer:
            self.cast_weight = other.cast_weight

    def output(self, hidden: Tensor, multiply: Multiply = products.linear) -> Tensor:
        """The head alone, on inputs ``(..., hidden)``: ``(..., vocabulary)``, of a frozen Linear by `multiply`."""
        assert self.layer is not None
        dtype = compute_dtype(hidden)
        if not is_linear(self.layer) or trained(self.layer):
            output: Tensor = self.layer(hidden)
            return output
        return multiply(hidden.to(dtype), *self.weights(dtype))

    def weights(self, dtype: torch.dtype) -> HeadWeights:
        """Weights of a head that is a Linear, in `dtype`, without gradients."""
        assert is_linear(self.layer)
        weight, bias = self.layer.weight, self.layer.bias
        # A cast that is kept would hold memory while the optimizer needs it, for a weight that it changes.
        keep = weight.dtype != dtype and not weight.requires_grad
        cast = self.cast_weight(weight, dtype) if keep else weight.detach().to(dtype)
        return HeadWeights(cast, None if bias is None else bias.detach().to(dtype))

    def logits(self, hidden: Tensor, multiply: Multiply = products.linear) -> Tensor:
        """Logits ``(..., vocabulary)`` of inputs of the head ``(..., hidden)``, as the model's forward gives them."""
        logits = self.output(hidden, multiply)
        for change, value in self.after:
            logits = change(logits, value)
        return logits

    def below(self, forward: Callable[..., Any], **inputs: Any) -> BelowHead:
        """Call `forward`, of the model or of its wrapper, on `inputs`, and keep what its head would have been given."""
        given: list[Tensor] = []

        def keep(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            given.append(arguments[0])
            return (arguments[0][:, :1].detach().contiguous(), *arguments[1:])  # no graph that holds the cast weight

        if self.layer is None:
            return whole_forward(forward, inputs)
        self.cast_weight.forget()
        handle = self.layer.register_forward_pre_hook(keep)
        try:
            outputs = forward(**inputs)
        finally:
            handle.remove()
        if not self.compared and not self.gives_the_logits_of(outputs, given):
            log("the logits of this model are made for all tokens at once: its output head is not the last step of it")
            self.layer = None
            return whole_forward(forward, inputs)
        self.compared = True
        weights = self.weights if is_linear(self.layer) and not self.after else None
        return BelowHead(outputs, given[0], self.logits, outputs.logits.shape[-1], trained(self.layer), weights)

    @torch.no_grad()
    def gives_the_logits_of(self, outputs: Any, given: list[Tensor]) -> bool:
        """Whether the head alone gives the first token the logits that `outputs` has for it."""
        if len(given) != 1 or given[0].ndim != 3:
            return False
        logits = self.logits(given[0][:, :1].contiguous(), linear).float()  # by torch, as the model itself: bit for bit
        expected = outputs.logits.float()
        return logits.shape == expected.shape and torch.equal(logits.nan_to_num(), expected.nan_to_num())


def follows_inputs(layer: nn.Module) -> bool:
    """Whether `layer` follows the range of its inputs, and so has to see those of all tokens at once."""
    return any(isinstance(m, FakeQuantLinear) and m.enabled and m.act_state is not None for m in layer.modules())


def whole_forward(forward: Callable[..., Any], inputs: dict[str, Any]) -> BelowHead:
    """A forward with its head: the logits stand for hidden states, and are their own logits."""
    outputs = forward(**inputs)
    return BelowHead(outputs, outputs.logits, lambda logits: logits, outputs.logits.shape[-1])


class Reference(Protocol):
    """Gives the float model to compare with, e.g. `llmqat.models.float_view.FloatCopy`."""

    def active(self, part: nn.Module | None = None) -> AbstractContextManager[nn.Module]:
        """The float model without gradients, or `part` of it."""
        ...


class ReferenceHead(OutputHead):
    """The output head of the float model of `reference`, whatever else runs when its logits are made.

    Args:
        reference: gives the model.
        apart: as in `OutputHead`.
    """

    def __init__(self, reference: Reference, apart: bool = True) -> None:
        self.reference = reference
        with reference.active() as model:
            super().__init__(model, apart)

    def output(self, hidden: Tensor, multiply: Multiply = products.linear) -> Tensor:
        """The head of the float model alone, without gradients."""
        with self.reference.active(self.layer):
            return super().output(hidden, multiply)
