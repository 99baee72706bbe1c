"""Arguments that the Python side of the decoder refuses: the library sees sizes and pointers, not what lies there."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels.decoder import ATTENTION, CacheBuffers, CacheShape, NativeDecoder, split_rows
from llmqat.kernels.greedy import GreedyDecoder
from llmqat.kernels.mixing import Mixing
from llmqat.kernels.packed import Packed
from llmqat.scheme import QuantScheme
from tests.kernels.test_checks import (
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    ROOM,
    SHAPE,
    SIDE,
    VOCABULARY,
    decode,
    layer,
    small_block,
    small_cache,
    small_decoder,
)
from tests.kernels.test_ops import packed_layer

TABLE = torch.ones(2, HEAD_DIM)


def run(hidden=None, cache=None, rotary=((TABLE, TABLE),)):
    hidden = torch.randn(2, HIDDEN) if hidden is None else hidden
    return small_decoder()(hidden, cache or small_cache(), 0, rotary)


def cache_of(heads=KV_HEADS, head_dim=HEAD_DIM, dtype=torch.float32, blocks=1, int8=False):
    cache = CacheBuffers(int8)
    cache.grow([CacheShape(heads, head_dim)] * blocks, dtype, ROOM)
    return cache


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (torch.randn(2, HIDDEN - 16), r"hidden states must be torch.float32 \(2, 64\), got torch.float32 \(2, 48\)"),
        (torch.randn(2, HIDDEN).half(), r"hidden states must be torch.float32 \(2, 64\), got torch.float16 \(2, 64\)"),
        (torch.randn(HIDDEN), r"hidden states must be torch.float32 \(64, 64\), got torch.float32 \(64,\)"),
        (torch.tensor(1.0), r"hidden states must be torch.float32 \(64,\), got torch.float32 \(\)"),
        (torch.empty(2, HIDDEN, device="meta"), "hidden states must lie on the CPU, contiguous; it is on meta"),
    ],
)
def test_hidden_states(hidden, message):
    with pytest.raises(LlmqatError, match=message):
        run(hidden)


@pytest.mark.parametrize(
    ("rotary", "message"),
    [
        ([(TABLE[:1], TABLE[:1])], r"rotary table must be torch.float32 \(2, 16\), got torch.float32 \(1, 16\)"),
        ([(TABLE, TABLE[:, :8])], r"rotary table must be torch.float32 \(2, 16\), got torch.float32 \(2, 8\)"),
        ([(TABLE, TABLE.double())], r"rotary table must be torch.float32 \(2, 16\), got torch.float64 \(2, 16\)"),
        ([(TABLE[None], TABLE[None])], r"rotary table must be torch.float32 \(2, 16\), got torch.float32 \(1, 2, 16\)"),
        ([], "number of a rotary table is 0, the kernels take 0 to -1"),
    ],
)
def test_rotary_tables(rotary, message):
    with pytest.raises(LlmqatError, match=message):
        run(rotary=rotary)


@pytest.mark.parametrize(
    "other", [{"heads": 1}, {"head_dim": 8}, {"dtype": torch.bfloat16}, {"blocks": 2}, {"blocks": 0}], ids=str
)
def test_caches_of_another_model(other):
    message = r"not those of 1 blocks with 2 heads of 16 features in torch.float32; start a new one"
    with pytest.raises(LlmqatError, match=message):
        run(cache=cache_of(**other))
    greedy = GreedyDecoder(small_decoder(), torch.randn(VOCABULARY, HIDDEN), layer(VOCABULARY, HIDDEN))
    with pytest.raises(LlmqatError, match=message):
        greedy.set_cache(cache_of(**other), [(TABLE, TABLE)])


def test_a_cache_whose_blocks_differ():
    cache = cache_of(blocks=2)
    cache.blocks[1] = cache_of(heads=1).blocks[0]
    with pytest.raises(
        LlmqatError, match=r"buffer of a cache must be torch.float32 \(2, \d+, 16\), got .* \(1, \d+, 16\)"
    ):
        _ = cache.pointers


def test_a_cache_of_codes():
    assert decode(small_decoder(), cache_of(int8=True)).isfinite().all()


def test_the_factor_of_a_block():
    with pytest.raises(LlmqatError, match=r"factor of a block must be torch.float32 \(1,\), got torch.float32 \(2,\)"):
        NativeDecoder([small_block(scale=torch.ones(2))], torch.ones(HIDDEN), SHAPE)


def test_side_inputs():
    decoder = NativeDecoder([small_block(SIDE)], torch.ones(HIDDEN), replace(SHAPE, side=SIDE))
    arguments = torch.randn(2, HIDDEN), small_cache(), 0, [(TABLE, TABLE)]
    assert decoder(*arguments, torch.randn(2, 1, SIDE)).isfinite().all()
    with pytest.raises(LlmqatError, match=r"side inputs must be torch.float32 \(2, 1, 32\), got .* \(2, 2, 32\)"):
        decoder(*arguments, torch.randn(2, 2, SIDE))
    with pytest.raises(LlmqatError, match="side has no memory"):
        decoder(*arguments)


def mixed_decoder():
    block = small_block()
    linears = {name: linear for name, linear in block.linears.items() if name not in ATTENTION}
    plain = replace(block, linears=linears, kv_heads=0, head_dim=0)
    return NativeDecoder([plain, small_block()], torch.ones(HIDDEN), SHAPE)


def test_what_stands_in_the_place_of_attention(monkeypatch):
    decoder, cache, seen = mixed_decoder(), CacheBuffers(), []
    cache.grow(decoder.caches, torch.float32, ROOM)
    assert (cache.depth, [len(pair[0]) for (pair,) in cache.blocks]) == (2, [0, KV_HEADS])

    def mix(block, hidden):
        seen.append(block)
        return hidden * 2

    arguments = torch.randn(2, HIDDEN), cache, 0, [(TABLE, TABLE)], None
    doubled = decoder(*arguments, Mixing(mix, HIDDEN, torch.float32))
    kept = decoder(*arguments, Mixing(lambda block, hidden: hidden, HIDDEN, torch.float32))
    assert not torch.allclose(doubled, kept)
    assert seen == [0]
    with pytest.raises(LlmqatError, match="block 0 has no attention, and nothing stands in its place"):
        decoder(*arguments)
    wrong = Mixing(lambda block, hidden: hidden[:, :3], HIDDEN, torch.float32)
    with pytest.raises(RuntimeError, match="size of tensor a"):
        decoder(*arguments, wrong)
    monkeypatch.setattr(wrong, "errors", nullcontext)
    with pytest.raises(LlmqatError, match="what stands in the place of attention in block 0 failed"):
        decoder(*arguments, wrong)


@pytest.mark.parametrize(
    ("norms", "norm", "message"),
    [
        (
            {"input_norm": torch.ones(16)},
            torch.ones(HIDDEN),
            r"input_norm must be torch.float32 \(64,\), got .* \(16,\)",
        ),
        ({"q_norm": torch.ones(HIDDEN)}, torch.ones(HIDDEN), r"q_norm must be torch.float32 \(16,\), got .* \(64,\)"),
        (
            {"mlp_norm": torch.ones(128)[::2]},
            torch.ones(HIDDEN),
            "mlp_norm must lie on the CPU, contiguous; .* strides",
        ),
        (
            {"last_norm": torch.ones(HIDDEN)},
            torch.ones(HIDDEN),
            "has the norms input_norm, .* side_norm, not last_norm",
        ),
        ({}, torch.ones(16), r"the norm must be torch.float32 \(64,\), got torch.float32 \(16,\)"),
        ({}, torch.ones(HIDDEN).double(), "read no norm of torch.float64; cast it to torch.float32"),
    ],
)
def test_norms(norms, norm, message):
    with pytest.raises(LlmqatError, match=message):
        NativeDecoder([replace(small_block(), norms=norms)], norm, SHAPE)


def test_a_float_embedding():
    for table in (torch.randn(VOCABULARY, 16), torch.randn(VOCABULARY), torch.randn(VOCABULARY, HIDDEN).half()):
        with pytest.raises(LlmqatError, match=r"the float embedding must be torch.float32 \(50, 64\), got"):
            GreedyDecoder(small_decoder(), table, layer(VOCABULARY, HIDDEN))


def test_rotary_tables_of_less_than_the_cache():
    greedy = GreedyDecoder(small_decoder(), torch.randn(VOCABULARY, HIDDEN), layer(VOCABULARY, HIDDEN))
    with pytest.raises(LlmqatError, match=r"rotary table must be torch.float32 \(8, 16\), got torch.float32 \(2, 16\)"):
        greedy.set_cache(small_cache(), [(TABLE, TABLE)])


def test_sequences_and_tokens_that_do_not_fit():
    decoder, caches, tables = small_decoder(), [small_cache(), small_cache()], [(torch.ones(3, 16), torch.ones(3, 16))]
    with pytest.raises(LlmqatError, match="2 sequences have one new token each, not 3"):
        decoder.together(torch.randn(3, HIDDEN), caches, tables)
    with pytest.raises(LlmqatError, match="number of sequences is 0, the kernels take 1 to"):
        decoder.together(torch.randn(3, HIDDEN), [], tables)
    full = small_cache()
    full.length = ROOM
    with pytest.raises(LlmqatError, match="number of new tokens is 1, the kernels take 0 to 0"):
        decoder.together(torch.randn(2, HIDDEN), [small_cache(), full], [(TABLE, TABLE)])


def test_rows_within_a_word_of_zero_points():
    packed, *_ = packed_layer(16, 32, QuantScheme(4, 16, symmetric=False))
    fused = Packed(*packed, None, 4, 32)
    assert [len(part.codes) for part in split_rows(fused, [8, 8])] == [8, 8]
    with pytest.raises(LlmqatError, match="row 4 of 4 bits begins in the middle of a word of zero points"):
        list(split_rows(fused, [4, 12]))
