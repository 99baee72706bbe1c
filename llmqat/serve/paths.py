"""Which path a packed model really took: counters of its calls, with the reasons why it did not run natively."""

from collections import Counter
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from torch import nn

from llmqat.compat.native import why_not_recognised
from llmqat.kernels import native
from llmqat.serve.families import FAMILIES
from llmqat.serve.stacks import stack_of


@dataclass(frozen=True)
class PathCounts:
    """Counts of the paths that a model took since it was loaded, or between two moments (`later - earlier`).

    Attributes:
        native: whether the model has a native path.
        why_not: why it has none; empty if it has one.
        loop_tokens: tokens that the native sampling loop computed.
        native_calls: calls of the decoder stack, prefills and single tokens, that the library computed.
        reference_calls: calls that went through the code of transformers.
        reasons: why calls and samplings went through transformers, and how often, the most frequent first.
    """

    native: bool
    why_not: str = ""
    loop_tokens: int = 0
    native_calls: int = 0
    reference_calls: int = 0
    reasons: tuple[tuple[str, int], ...] = ()

    def __sub__(self, earlier: "PathCounts") -> "PathCounts":
        reasons = Counter(dict(self.reasons)) - Counter(dict(earlier.reasons))
        return PathCounts(
            self.native,
            self.why_not,
            self.loop_tokens - earlier.loop_tokens,
            self.native_calls - earlier.native_calls,
            self.reference_calls - earlier.reference_calls,
            tuple(reasons.most_common()),
        )

    @property
    def all_native(self) -> bool:
        """Whether everything that was counted ran natively."""
        return self.native and not self.reference_calls and not self.reasons

    def summary(self) -> str:
        """The counts in one line."""
        if not self.native:
            return f"reference path: {self.why_not}"
        counted = f"native loop {self.loop_tokens} tokens, native blocks {self.native_calls} calls"
        if self.all_native:
            return counted
        reasons = "; ".join(f"{reason} ({count})" for reason, count in self.reasons)
        return f"{counted}, reference {self.reference_calls} calls: {reasons}"


@dataclass
class Counts:
    """The running counters behind `PathCounts`."""

    native: bool = False
    why_not: str = "llmqat did not attach its kernels to this model"
    loop_tokens: int = 0
    native_calls: int = 0
    reference_calls: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def left_to_transformers(self, reason: str, call: bool = True) -> None:
        """Count a call of the decoder stack, or else a sampling loop, that does not run natively."""
        self.reasons[reason] += 1
        self.reference_calls += call


# By decoder stack, and not an attribute of it: a copy of a model starts counting anew.
_counts: WeakKeyDictionary[nn.Module, Counts] = WeakKeyDictionary()


def counts_of(stack: nn.Module) -> Counts:
    """The running counters of a decoder stack."""
    if stack not in _counts:
        _counts[stack] = Counts("forward" in vars(stack))
    return _counts[stack]


def path_counts(model: nn.Module) -> PathCounts:
    """Which path the calls of `model` took so far; subtract two of them to know what ran in between."""
    stack = stack_of(model)
    counts = counts_of(model if stack is None else stack)
    why_not = "" if counts.native else counts.why_not
    numbers = counts.loop_tokens, counts.native_calls, counts.reference_calls
    return PathCounts(counts.native, why_not, *numbers, tuple(counts.reasons.most_common()))


def native_path() -> str:
    """One line: what packed models run on here, and why not natively if so."""
    why_not = why_not_recognised() or ("" if native.library() else native.explain())
    families = ", ".join(sorted(FAMILIES))
    return (
        f"reference ({why_not})" if why_not else f"native blocks and sampling for {families}; transformers for others"
    )
