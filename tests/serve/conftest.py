"""Which parts of the native decoder ran, and on which instruction set."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from torch import Tensor

from llmqat.kernels import native
from llmqat.kernels.decoder import NativeDecoder
from llmqat.serve.step import GreedyStep, Step


@pytest.fixture(params=native.available())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """One instruction set of this machine, in use."""
    library: Any = native.library()
    library.llmqat_use_isa(native.ISAS.index(request.param))
    yield request.param
    library.llmqat_use_isa(library.llmqat_best_isa())


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the buffers of the cache grow after few tokens."""
    monkeypatch.setattr("llmqat.kernels.decoder.CAPACITY_GROWTH", 8)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each call of the native decoder got."""
    seen, plain = [], NativeDecoder.__call__

    def counted(self: NativeDecoder, hidden: Tensor, *args: Any) -> Tensor:
        seen.append(hidden.shape[0])
        return plain(self, hidden, *args)

    monkeypatch.setattr(NativeDecoder, "__call__", counted)
    return seen


def count(monkeypatch: pytest.MonkeyPatch, kind: type, seen: list[int]) -> None:
    """Record the tokens that this kind of step goes on from."""
    plain: Callable[..., Any] = kind.__call__  # type: ignore[operator]

    def counted(self: Any, token: Any) -> Any:
        seen.append(int(token))
        return plain(self, token)

    monkeypatch.setattr(kind, "__call__", counted)


@pytest.fixture
def greedy_steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that the native loop went on from, each in one call of the library."""
    seen: list[int] = []
    count(monkeypatch, GreedyStep, seen)
    return seen


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that the native loop went on from, by its operators."""
    seen: list[int] = []
    count(monkeypatch, Step, seen)
    return seen
