"""The native decoder through ctypes: all blocks of a Llama-like model in one call (csrc/core/decoder.h)."""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.kernels.mixing import Mixing
from llmqat.kernels.packed import Packed

ATTENTION = ("q", "k", "v", "o")
LINEARS = (*ATTENTION, "gate", "up", "down", "side_gate", "side_up")
OPTIONAL = frozenset(("k", "v", "side_gate", "side_up"))  # of a block that reads other keys, or no side input
CAPACITY_GROWTH = 256  # tokens a cache buffer grows by, at least
HEAD_NORMS = ("q_norm", "k_norm", "v_norm")
NORMS = ("input_norm", "attended_norm", "mlp_norm", "mlp_out_norm", *HEAD_NORMS, "side_norm")
OF_HEAD, OF_ROTATED_HEAD, OF_ALL_HEADS = range(3)  # `HeadNorm` of csrc/core/steps.h
UNLIMITED = 1 << 62  # a window that sees every token


class _Block(ctypes.Structure):
    _fields_ = (
        *((name, native.Matrix) for name in LINEARS),
        *((name, ctypes.c_void_p) for name in (*NORMS, "scale")),
        *((name, ctypes.c_int64) for name in ("kv_heads", "head_dim", "window", "rotary", "query_rotary")),
    )


class _Decoder(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.POINTER(_Block)),
        ("norm", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "hidden", "heads", "side")),
        *((name, ctypes.c_float) for name in ("eps", "norm_offset", "attention_scale", "softcap")),
        *((name, ctypes.c_float) for name in ("embedding_scale", "residual_scale")),
        *((name, ctypes.c_int32) for name in ("dtype", "activation", "norm_rounds_once", "head_norm", "neighbours")),
        ("output_gate", ctypes.c_int32),
    )


class _Cache(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("keys", "values", "key_scale", "value_scale"))


class _Sequence(ctypes.Structure):
    _fields_ = (("cache", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("capacity", "past")))


class _Rotary(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cosine", "sine")),
        ("dim", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
    )


Rotary = Sequence[tuple[Tensor, Tensor]]


def contiguous_tables(rotary: Rotary, tokens: int, dtype: torch.dtype) -> Rotary:
    """Contiguous cosines and sines of so many tokens.

    Raises:
        LlmqatError: if a table is not ``(tokens, dim)`` in that dtype or in float32.
    """
    tables = [(cosine.contiguous(), sine.contiguous()) for cosine, sine in rotary]
    for cosine, sine in tables:
        kind = torch.float32 if cosine.dtype == torch.float32 else dtype
        for table in (cosine, sine):
            native.check_memory("rotary table", table, (tokens, *cosine.shape[-1:]), kind)
    return tables


def rotary_structs(tables: Rotary) -> Any:
    """Ctypes structs of contiguous rotary tables ``(m, dim)``; keep them alive while the library uses them."""
    structs = (_Rotary(c.data_ptr(), s.data_ptr(), c.shape[-1], native.DTYPES[c.dtype]) for c, s in tables)
    return (_Rotary * len(tables))(*structs)


@dataclass(frozen=True)
class Shape:
    """Sizes and constants of a decoder.

    Attributes:
        norm_offset: norms multiply by this plus their weight.
        attention_scale: factor of the attention scores.
        softcap: soft cap of the scaled scores; 0 for none.
        activation: `Activation` of csrc/core/steps.h.
        side: features of the side input of each block; 0 for none.
        embedding_scale: factor of the embeddings.
        residual_scale: factor of what a branch adds to the residual.
        norm_rounds_once: whether norms round the product only, or what they multiply by their weight, too.
        head_norm: `HeadNorm` of csrc/core/steps.h, of the norms of q and k.
        neighbours: whether the pairs that are rotated are neighbours, or a feature of each half.
        output_gate: whether q gives a gate of what each head attends, too: ``(heads, 2, head_dim)``.
    """

    hidden: int
    heads: int
    eps: float
    norm_offset: float
    attention_scale: float
    softcap: float
    activation: int
    side: int = 0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    norm_rounds_once: bool = False
    head_norm: int = OF_HEAD
    neighbours: bool = False
    output_gate: bool = False

    def norm_features(self, name: str, kv_heads: int, head_dim: int) -> int:
        """How many features the norm of this name in `NORMS` scales, in a block with such heads."""
        if name not in HEAD_NORMS:
            return self.hidden
        heads = self.heads if name == "q_norm" else kv_heads
        return head_dim * (heads if self.head_norm == OF_ALL_HEADS else 1)


@dataclass(frozen=True)
class Block:
    """A transformer block as the library takes it.

    Attributes:
        linears: packed layers by their name in `LINEARS`; those in `OPTIONAL` may be missing, and all in `ATTENTION`,
            where a mixer stands in its place (`Mixing`).
        norms: weights by their name in `NORMS`.
        scale: factor ``(1,)`` of what the block gives, in the dtype of the norms.
        window: how many tokens a query sees, itself included.
        rotary: index of the rotary tables for its keys.
        query_rotary: index of those for its queries.
        keys_of: number of the block whose keys and values it reads; None for its own.
    """

    linears: Mapping[str, Packed]
    norms: Mapping[str, Tensor]
    kv_heads: int
    head_dim: int
    scale: Tensor | None = None
    window: int = UNLIMITED
    rotary: int = 0
    query_rotary: int = 0
    keys_of: int | None = None


def split_rows(packed: Packed, rows: Sequence[int]) -> Iterator[Packed]:
    """The first ``rows[0]`` rows of a layer, the next ``rows[1]``, ..., as layers on its memory.

    Raises:
        LlmqatError: if a part begins in the middle of a word of zero points, which are packed along rows.
    """
    codes, scale, zero_point, bias, bits, *_ = packed
    for part, count in enumerate(rows):
        start = sum(rows[:part])
        own, words = slice(start, start + count), slice(start * bits // 32, -(-(start + count) * bits // 32))
        if zero_point is not None and start * bits % 32:
            raise LlmqatError(
                f"row {start} of {bits} bits begins in the middle of a word of zero points; split elsewhere"
            )
        yield packed._replace(
            codes=codes[own],
            scale=scale[own],
            zero_point=None if zero_point is None else zero_point[words],
            bias=None if bias is None else bias[own],
        )


class NativeDecoder:
    """Runs transformer blocks and the last norm in the library.

    It borrows the tensors of the model: drop it when they are replaced.

    Attributes:
        caches: what each block stores in a cache.

    Raises:
        LlmqatError: for a layer that `native.matrix` refuses, or a norm that the library cannot read.
    """

    def __init__(self, blocks: Sequence[Block], norm: Tensor, shape: Shape) -> None:
        native.check_dtype("norm", norm)
        native.check_memory("norm", norm, (shape.hidden,), norm.dtype)
        self.shape, self.dtype, self.blocks, self._norm = shape, norm.dtype, blocks, norm
        self.caches = [CacheShape(block.kv_heads, block.head_dim, block.keys_of) for block in blocks]
        self._blocks = (_Block * len(blocks))(*(self._struct(block) for block in blocks))
        sizes = (shape.hidden, shape.heads, shape.side)
        numbers = (shape.eps, shape.norm_offset, shape.attention_scale, shape.softcap)
        scales = (shape.embedding_scale, shape.residual_scale)
        kinds = (native.DTYPES[norm.dtype], shape.activation, shape.norm_rounds_once, shape.head_norm)
        heads = (shape.neighbours, shape.output_gate)
        self.struct = _Decoder(self._blocks, norm.data_ptr(), len(blocks), *sizes, *numbers, *scales, *kinds, *heads)

    def _struct(self, block: Block) -> _Block:
        struct = _Block()
        lacks = OPTIONAL if "q" in block.linears else OPTIONAL.union(ATTENTION)
        for name in LINEARS:
            if name in block.linears or name not in lacks:
                setattr(struct, name, native.matrix(block.linears[name]))
        for name, weight in block.norms.items():
            if name not in NORMS:
                raise LlmqatError(f"a block has the norms {', '.join(NORMS)}, not {name}")
            features = self.shape.norm_features(name, block.kv_heads, block.head_dim)
            native.check_memory(name, weight, (features,), self.dtype)
            setattr(struct, name, weight.data_ptr())
        if block.scale is not None:
            native.check_memory("factor of a block", block.scale, (1,), self.dtype)
            struct.scale = block.scale.data_ptr()
        for name in ("kv_heads", "head_dim", "window", "rotary", "query_rotary"):
            setattr(struct, name, getattr(block, name))
        return struct

    def __call__(
        self,
        hidden: Tensor,
        cache: "CacheBuffers",
        past: int,
        rotary: Rotary,
        side: Tensor | None = None,
        mixing: Mixing | None = None,
    ) -> Tensor:
        """Hidden states ``(m, hidden)`` of `m` new tokens, after the last norm.

        Args:
            hidden: embeddings ``(m, hidden)``, of the dtype of the norms.
            cache: room for `past` + `m` tokens, of which the first `past` are filled; the new ones are appended.
            past: tokens in the cache.
            rotary: tables of cosines and sines ``(m, dim)`` of the new positions, in the dtype of the norms or in
                float32, for the first features of a head.
            side: side inputs ``(m, blocks, side)`` in the dtype of the norms, where blocks read some.
            mixing: computes what stands in the place of attention, where blocks have none.
        """
        return self._decode(hidden, [(cache, past)], rotary, side, mixing)

    def together(
        self, hidden: Tensor, caches: Sequence["CacheBuffers"], rotary: Rotary, side: Tensor | None = None
    ) -> Tensor:
        """Hidden states ``(n, hidden)`` of one new token of each of `n` sequences, after the last norm.

        Args:
            hidden: embeddings ``(n, hidden)``, of the dtype of the norms.
            caches: one for each sequence, with room for one more token than its length.
            rotary: tables ``(n, dim)`` of the positions of the new tokens, each in its own sequence.
            side: side inputs ``(n, blocks, side)``, where blocks read some.
        """
        return self._decode(hidden, [(cache, cache.length) for cache in caches], rotary, side, None)

    def _decode(
        self,
        hidden: Tensor,
        sequences: Sequence[tuple["CacheBuffers", int]],
        rotary: Rotary,
        side: Tensor | None,
        mixing: Mixing | None,
    ) -> Tensor:
        library = native.library()
        assert library is not None
        out = hidden.clone(memory_format=torch.contiguous_format)
        native.check_memory("hidden states", out, (*hidden.shape[:1], self.shape.hidden), self.dtype)
        if side is not None:
            side = side.contiguous()
            native.check_memory("side inputs", side, (len(hidden), len(self.blocks), self.shape.side), self.dtype)
        tables = contiguous_tables(rotary, len(hidden), self.dtype)
        held = [(ctypes.addressof(self.pointers(cache)), cache.capacity, past) for cache, past in sequences]
        native.use_threads(library)
        with nullcontext() if mixing is None else mixing.errors():
            library.llmqat_decode(
                ctypes.byref(self.struct),
                (_Sequence * len(held))(*(_Sequence(*one) for one in held)),
                ctypes.c_int64(len(held)),
                ctypes.c_int64(len(hidden)),
                rotary_structs(tables),
                ctypes.c_int64(len(tables)),
                ctypes.c_void_p(None if side is None else side.data_ptr()),
                ctypes.c_void_p(None if mixing is None else mixing.address),
                ctypes.c_void_p(out.data_ptr()),
            )
        return out

    def pointers(self, cache: "CacheBuffers") -> Any:
        """Ctypes structs of `cache`, one for each block.

        Raises:
            LlmqatError: if keys and values of these blocks do not go into its buffers.
        """
        if not self.fits(cache):
            raise LlmqatError(
                f"the buffers of this cache are not those of {len(self.blocks)} blocks with {self._heads} in "
                f"{self.dtype}; start a new one"
            )
        return cache.pointers

    @property
    def _heads(self) -> str:
        kinds = dict.fromkeys((shape.kv_heads, shape.head_dim) for shape in self.caches)
        return " and ".join(f"{heads} heads of {features} features" for heads, features in kinds)

    def fits(self, cache: "CacheBuffers") -> bool:
        """Whether `cache` has buffers for the keys and values of these blocks."""
        return (cache.shapes, cache.dtype) == (self.caches, self.dtype)


class CacheShape(NamedTuple):
    """Shape of what a block stores in a cache: keys and values ``(kv_heads, tokens, head_dim)``.

    Attributes:
        keys_of: number of the block before it whose keys and values it reads, and stores none; None for its own.
    """

    kv_heads: int
    head_dim: int
    keys_of: int | None = None

    @property
    def stores(self) -> bool:
        """Whether the block stores anything there: attention does, with keys of its own."""
        return self.keys_of is None and self.kv_heads > 0


@dataclass
class CacheBuffers:
    """Keys and values of every block, and how many tokens they hold.

    Attributes:
        int8: whether it holds codes and scales, on the grid of `llmqat.quant.affine.quantize_activation`.
        blocks: for each, keys and values ``(kv_heads, capacity, head_dim)``; with `int8`, the codes of both, then the
            float32 scales of both ``(kv_heads, capacity, 1)``. Blocks that share keys and values share their buffers.
        length: tokens held.
        shapes: what each block stores.
        dtype: of what is stored, or of what the codes stand for.
    """

    int8: bool = False
    blocks: list[list[tuple[Tensor, Tensor]]] = field(default_factory=list)
    length: int = 0
    shapes: list[CacheShape] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    _pointers: Any = field(default=None, repr=False, compare=False)

    @property
    def capacity(self) -> int:
        """Tokens there is room for."""
        return self.blocks[0][0][0].shape[1] if self.blocks else 0

    @property
    def pointers(self) -> Any:
        """Ctypes structs of the cache, one for each block.

        Raises:
            LlmqatError: if the buffers of a block are not of its shape.
        """
        if self._pointers is None:
            for block, shape in zip(self.blocks, self.shapes, strict=True):
                for pair, (width, kind) in zip(block, self._kinds(shape.head_dim, self.dtype), strict=True):
                    for part in pair:
                        native.check_memory("buffer of a cache", part, (shape.kv_heads, self.capacity, width), kind)
            addresses = ((part.data_ptr() for pair in block for part in pair) for block in self.blocks)
            self._pointers = (_Cache * len(self.blocks))(*(_Cache(*parts) for parts in addresses))
        return self._pointers

    @property
    def depth(self) -> int:
        """The number of the last block that stores something, and one: as many layers a cache has at least."""
        return max((index + 1 for index, shape in enumerate(self.shapes) if shape.stores), default=0)

    def __getstate__(self) -> dict[str, Any]:
        """The state without ctypes pointers: a copy has tensors of its own, and pickles no pointers."""
        return {**self.__dict__, "_pointers": None}

    def grow(self, shapes: list[CacheShape], dtype: torch.dtype, needed: int) -> None:
        """Make room for `needed` tokens of blocks that store these; those that are filled are copied."""
        if self.capacity >= needed:
            return
        capacity, old = max(needed + CAPACITY_GROWTH, 2 * self.capacity), self.blocks
        grown: list[list[tuple[Tensor, Tensor]]] = []
        for heads, width, keys_of in shapes:
            empty = (partial(torch.empty, heads, capacity, w, dtype=kind) for w, kind in self._kinds(width, dtype))
            grown.append([(one(), one()) for one in empty] if keys_of is None else grown[keys_of])
        for shape, kept, block in zip(shapes, old, grown, strict=False):
            for sources, targets in zip(kept, block, strict=True) if shape.keys_of is None else ():
                for source, target in zip(sources, targets, strict=True):
                    target[:, : self.length] = source[:, : self.length]
        self._pointers = None
        self.blocks, self.shapes, self.dtype = grown, shapes, dtype  # at the end: an interruption leaves what was

    def _kinds(self, width: int, dtype: torch.dtype) -> list[tuple[int, torch.dtype]]:
        """Widths and dtypes of the pairs of buffers of a block whose heads have `width` features."""
        return [(width, torch.int8), (1, torch.float32)] if self.int8 else [(width, dtype)]
