"""Greedy decoding through ctypes: from a token to the next one in one call (`llmqat_greedy` of csrc/core/decoder.h)."""

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmqat.kernels import native
from llmqat.kernels.decoder import CacheBuffers, NativeDecoder, Rotary, contiguous_tables, rotary_structs
from llmqat.kernels.mixing import Mixing
from llmqat.kernels.packed import Packed


class _Greedy(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("decoder", "embedding", "embedding_rows")),
        ("vocabulary", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("head", "cache", "rotary")),
        *((name, ctypes.c_int64) for name in ("rotary_tables", "capacity", "threads")),
        *((name, ctypes.c_void_p) for name in ("mix", "hidden", "logits")),
    )


class GreedyDecoder:
    """Embedding, blocks, last norm, head and the choice of the largest logit, of one token a call.

    It borrows the tensors of the model and of the cache: call `set_cache` again when its buffers have grown.
    """

    def __init__(self, decoder: NativeDecoder, embedding: Packed | Tensor, head: Packed) -> None:
        """Make the struct of the call, which borrows the tensors of all three.

        Args:
            decoder: the blocks and the last norm.
            embedding: kernel arguments of a packed embedding, or a float table ``(vocabulary, hidden)`` in the dtype of
                the decoder.
            head: kernel arguments of the packed output head.

        Raises:
            LlmqatError: if the library cannot read the embedding or the head as they lie.
        """
        if isinstance(embedding, Tensor):
            shape = (*embedding.shape[:1], decoder.shape.hidden)
            native.check_memory("float embedding", embedding, shape, decoder.dtype)
        library = native.library()
        assert library is not None
        self._next, self._head = library.llmqat_next_token, native.matrix(head)
        packed = None if isinstance(embedding, Tensor) else native.matrix(embedding)
        rows = embedding.data_ptr() if isinstance(embedding, Tensor) else None
        hidden, logits = (torch.empty(n, dtype=decoder.dtype) for n in (decoder.shape.hidden, self._head.out))
        self._struct = _Greedy(
            decoder=ctypes.addressof(decoder.struct),
            embedding=None if packed is None else ctypes.addressof(packed),
            embedding_rows=rows,
            vocabulary=len(embedding if isinstance(embedding, Tensor) else embedding.codes),
            head=ctypes.addressof(self._head),
            threads=native.threads(),
            hidden=hidden.data_ptr(),
            logits=logits.data_ptr(),
        )
        self._address = ctypes.addressof(self._struct)
        self._decoder, self._kept = decoder, (embedding, packed, head, hidden, logits)
        self._used: tuple[Any, ...] = ()
        self._mixing: Mixing | None = None

    def set_cache(self, cache: CacheBuffers, rotary: Rotary, mixing: Mixing | None = None) -> None:
        """Decode into `cache`, with rotary tables ``(capacity, dim)`` of all its positions, in its dtype or float32;
        `mixing` as in `NativeDecoder`.

        Raises:
            LlmqatError: if the tables are others, or the buffers of the cache are not those of the decoder.
        """
        buffers, tables = self._decoder.pointers(cache), contiguous_tables(rotary, cache.capacity, self._decoder.dtype)
        pointers = rotary_structs(tables)
        self._used, self._mixing = (tables, pointers, buffers, cache.blocks), mixing
        self._struct.mix = None if mixing is None else mixing.address
        self._struct.cache, self._struct.capacity = ctypes.addressof(buffers), cache.capacity
        self._struct.rotary, self._struct.rotary_tables = ctypes.addressof(pointers), len(tables)

    def __call__(self, token: int, past: int) -> int:
        """The token that follows `token`, which is added to the `past` tokens in the cache: there has to be room."""
        if self._mixing is None:
            following: int = self._next(self._address, token, past)
            return following
        with self._mixing.errors():
            return int(self._next(self._address, token, past))
