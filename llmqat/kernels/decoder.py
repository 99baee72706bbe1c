"""The native decoder through ctypes: all blocks of a Llama-like model in one call (csrc/decoder.h)."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import native

LINEARS = ("q", "k", "v", "o", "gate", "up", "down")
CAPACITY_STEP = 256  # tokens a cache buffer grows by, at least
NORMS = ("input_norm", "post_norm", "q_norm", "k_norm")


class _Block(ctypes.Structure):
    _fields_ = (*((name, native.Matrix) for name in LINEARS), *((name, ctypes.c_void_p) for name in NORMS))


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "heads", "kv_heads", "head_dim", "intermediate")),
        ("eps", ctypes.c_float),
        ("attention_scale", ctypes.c_float),
        ("dtype", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class _Cache(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("keys", "values", "key_scale", "value_scale"))


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, as its config names them."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    attention_scale: float


@dataclass(frozen=True)
class Block:
    """One block: seven packed layers (arguments of `native.matrix`) and up to four norm weights."""

    linears: Sequence[tuple[Any, ...]]
    norms: Sequence[Tensor | None]


class NativeDecoder:
    """Runs `blocks` and the last norm. It borrows the tensors of the model: drop it when they are replaced."""

    def __init__(self, blocks: Sequence[Block], norm: Tensor, shape: Shape) -> None:
        self.shape, self.dtype, self._kept = shape, norm.dtype, (blocks, norm)
        self.blocks = len(blocks)
        self._blocks = (_Block * len(blocks))()
        for target, block in zip(self._blocks, blocks, strict=True):
            for name, arguments in zip(LINEARS, block.linears, strict=True):
                setattr(target, name, native.matrix(*arguments))
            for name, weight in zip(NORMS, block.norms, strict=True):
                setattr(target, name, None if weight is None else weight.data_ptr())
        sizes = (shape.hidden, shape.heads, shape.kv_heads, shape.head_dim, shape.intermediate)
        numbers = (len(blocks), *sizes, shape.eps, shape.attention_scale, native.DTYPES[norm.dtype], 0)
        self._model = _Decoder(self._blocks, norm.data_ptr(), *numbers)

    def __call__(self, hidden: Tensor, cache: "CacheBuffers", past: int, cosine: Tensor, sine: Tensor) -> Tensor:
        """Hidden states ``(m, hidden)`` of `m` new tokens, after the last norm.

        Args:
            hidden: embeddings ``(m, hidden)``, of the dtype of the norms.
            cache: room for `past` + `m` tokens, of which the first `past` are filled; the new ones are written behind.
            past: tokens in the cache.
            cosine: rotary tables ``(m, head_dim)`` of the new positions, in the same dtype.
            sine: likewise.
        """
        library = native.library()
        assert library is not None
        out = hidden.clone(memory_format=torch.contiguous_format)
        cosine, sine = cosine.contiguous(), sine.contiguous()
        library.llmqat_set_threads(native.threads())
        library.llmqat_decode(
            ctypes.byref(self._model),
            cache.pointers,
            ctypes.c_int64(cache.capacity),
            ctypes.c_int64(past),
            ctypes.c_int64(hidden.shape[0]),
            ctypes.c_void_p(cosine.data_ptr()),
            ctypes.c_void_p(sine.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out


@dataclass
class CacheBuffers:
    """Keys and values of every block, and how many tokens they hold.

    Attributes:
        int8: whether it holds codes and scales, on the grid of `llmqat.quant.affine.quantize_activation`.
        blocks: for each, keys and values ``(kv_heads, capacity, head_dim)``; with `int8`, the codes of both, then the
            float32 scales of both ``(kv_heads, capacity, 1)``.
        length: tokens held.
    """

    int8: bool = False
    blocks: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    length: int = 0

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.blocks[0][0][0].shape[1] if self.blocks else 0

    @property
    def pointers(self) -> Any:
        """What the library gets: a struct for each block."""
        addresses = ((part.data_ptr() for pair in block for part in pair) for block in self.blocks)
        return (_Cache * len(self.blocks))(*(_Cache(*parts) for parts in addresses))

    def grow(self, blocks: int, kv_heads: int, head_dim: int, dtype: torch.dtype, needed: int) -> None:
        """Have room for `needed` tokens; what is filled moves along."""
        if self.capacity >= needed:
            return
        capacity, old = max(needed + CAPACITY_STEP, 2 * self.capacity), self.blocks
        pairs = [(head_dim, torch.int8), (1, torch.float32)] if self.int8 else [(head_dim, dtype)]

        def empty(width: int, kind: torch.dtype) -> Tensor:
            return torch.empty(kv_heads, capacity, width, dtype=kind)

        self.blocks = [[(empty(*pair), empty(*pair)) for pair in pairs] for _ in range(blocks)]
        for kept, block in zip(old, self.blocks, strict=False):
            for sources, targets in zip(kept, block, strict=True):
                for source, target in zip(sources, targets, strict=True):
                    target[:, : self.length] = source[:, : self.length]
