"""What the compiled kernels refuse: sizes and pointers (csrc/core/checks.h), threads and memory that are not there."""

import ctypes
import os
import re
import subprocess
import sys
from operator import attrgetter
from typing import Any

import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.kernels.decoder import Block, CacheBuffers, CacheShape, NativeDecoder, Shape
from llmqat.kernels.greedy import GreedyDecoder
from llmqat.kernels.packed import Packed
from llmqat.scheme import QuantScheme
from tests.kernels.test_ops import packed_layer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, VOCABULARY, ROOM = 64, 4, 2, 16, 96, 50, 8
SHAPE = Shape(HIDDEN, HEADS, 1e-5, 0.0, 0.25, 0.0, 0)
SIDE = 32


def layer(out: int, in_features: int) -> Packed:
    packed, *_ = packed_layer(out, in_features, QuantScheme(4, 16))
    return Packed(*packed, None, 4, in_features)


@pytest.fixture
def arguments():
    """A layer of 7 rows of 32 weights, its struct, input and output."""
    kept = layer(7, 32)
    return kept, native.matrix(kept), torch.randn(3, 32), torch.empty(3, 7)


MATRICES = [
    ("out", 0, "out is 0, the kernels take 1 to 268435456"),
    ("in", -1, "in is -1, the kernels take 1 to"),
    ("in", 1 << 40, "in is 1099511627776, the kernels take 1 to 268435456"),
    ("groups", 0, "groups is 0, the kernels take 1 to 32"),
    ("groups", 3, "3 groups do not divide 32 inputs"),
    ("groups", 4, "groups of 8 weights: the kernels take a multiple of 16, or one a row"),
    ("row_bytes", 15, "row_bytes is 15, the kernels take 16 to"),
    ("bits", 5, "bits is 5, the kernels take 2, 3, 4 or 8"),
    ("act_bits", 4, "act_bits is 4, the kernels take 8, or 0 for none"),
    ("scale_dtype", 3, "scale has dtype number 3, there are 0 to 2"),
    ("codes", None, "codes has no memory"),
    ("scale", None, "scale has no memory"),
]


@pytest.mark.parametrize(("field", "value", "message"), MATRICES)
def test_a_matrix_that_is_none(arguments, field, value, message):
    _, matrix, x, y = arguments
    setattr(matrix, field, value)
    with pytest.raises(LlmqatError, match=f"llmqat_linear: {message}"):
        native.library().llmqat_linear(ctypes.addressof(matrix), x.data_ptr(), y.data_ptr(), 3, 0)


def test_the_dtype_of_a_bias(arguments):
    _, matrix, x, y = arguments
    matrix.bias, matrix.bias_dtype = y.data_ptr(), 9
    with pytest.raises(LlmqatError, match="bias has dtype number 9"):
        native.library().llmqat_linear(ctypes.addressof(matrix), x.data_ptr(), y.data_ptr(), 3, 0)


def test_calls_of_a_layer(arguments):
    _, matrix, x, y = arguments
    library, address = native.library(), ctypes.addressof(matrix)
    with pytest.raises(LlmqatError, match="number of tokens is -1, the kernels take 0 to"):
        library.llmqat_linear(address, x.data_ptr(), y.data_ptr(), -1, 0)
    with pytest.raises(LlmqatError, match="x has dtype number 7"):
        library.llmqat_linear(address, x.data_ptr(), y.data_ptr(), 3, 7)
    with pytest.raises(LlmqatError, match="x has no memory"):
        library.llmqat_linear(address, None, y.data_ptr(), 3, 0)
    with pytest.raises(LlmqatError, match="y has no memory"):
        library.llmqat_linears(address, 1, x.data_ptr(), None, 3, 0)


@pytest.mark.parametrize("number", [-1, 7, 1 << 40])
def test_rows_that_a_matrix_does_not_have(arguments, number):
    kept, *_ = arguments
    with pytest.raises(LlmqatError, match=f"number of a row is {number}, the kernels take 0 to 6"):
        native.Layer(kept).rows(torch.tensor([0, number]))


def test_the_largest_of_no_values():
    with pytest.raises(LlmqatError, match="number of values is 0, the kernels take 1 to"):
        native.argmax(torch.empty(0))


def test_bandwidth_of_too_little_memory():
    with pytest.raises(LlmqatError, match="bytes is 32, the kernels take 1048576 to"):
        native.read_bandwidth(torch.ones(8))


def small_block(side: int = 0, **options: Any) -> Block:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = dict.fromkeys(("gate", "up"), (INTERMEDIATE, HIDDEN)) | dict.fromkeys(("k", "v"), (keys, HIDDEN))
    shapes |= {"q": (queries, HIDDEN), "o": (HIDDEN, queries), "down": (HIDDEN, INTERMEDIATE)}
    shapes |= {"side_gate": (side, HIDDEN), "side_up": (HIDDEN, side)} if side else {}
    norms = {name: torch.ones(HIDDEN) for name in ("input_norm", "mlp_norm")}
    return Block({name: layer(*shape) for name, shape in shapes.items()}, norms, KV_HEADS, HEAD_DIM, **options)


def small_decoder() -> NativeDecoder:
    return NativeDecoder([small_block()], torch.ones(HIDDEN), SHAPE)


def small_cache() -> CacheBuffers:
    pair = torch.zeros(KV_HEADS, ROOM, HEAD_DIM), torch.zeros(KV_HEADS, ROOM, HEAD_DIM)
    return CacheBuffers(blocks=[[(pair[0], pair[1])]], shapes=[CacheShape(KV_HEADS, HEAD_DIM)])


def decode(decoder, cache=None, past=0, tokens=2, dim=HEAD_DIM):
    tables = [(torch.ones(tokens, dim), torch.zeros(tokens, dim))]
    return decoder(torch.randn(tokens, HIDDEN), cache or small_cache(), past, tables)


def test_a_decoder_in_order():
    assert decode(small_decoder()).isfinite().all()


DECODERS = [
    ("hidden", 0, "hidden is 0, the kernels take 1 to"),
    ("hidden", 80, r"q is \(64, 64\), the decoder needs \(64, 80\)"),
    ("heads", 1 << 40, "heads is 1099511627776, the kernels take 1 to 16777216"),
    ("side", -1, "side is -1, the kernels take 0 to"),
    ("dtype", 5, "decoder has dtype number 5"),
    ("activation", 2, "there is no activation 2"),
    ("head_norm", 3, "number of a kind of norms of q and k is 3, the kernels take 0 to 2"),
    ("count", -1, "number of blocks is -1"),
    ("norm", None, "norm has no memory"),
]


@pytest.mark.parametrize(("field", "value", "message"), DECODERS)
def test_a_decoder_that_does_not_fit(field, value, message):
    decoder = small_decoder()
    setattr(decoder.struct, field, value)
    with pytest.raises(LlmqatError, match=f"llmqat_decode: {message}"):
        decode(decoder)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("head_dim", 513, "head_dim is 513, the kernels take 1 to 512"),
        ("head_dim", 8, r"q is \(64, 64\), the decoder needs \(32, 64\)"),
        ("kv_heads", 3, "3 kv_heads do not divide 4 heads"),
        ("kv_heads", 8, "kv_heads is 8, the kernels take 1 to 4"),
        ("gate.out", 64, r"up is \(96, 64\), the decoder needs \(64, 64\)"),
        ("gate.out", 0, "intermediate is 0, the kernels take 1 to"),
        ("k.codes", None, "a block has values of its own, and no keys"),
        ("side_gate.codes", 1 << 12, r"out is 0, the kernels take 1 to"),
        ("window", 0, "window is 0, the kernels take 1 to"),
        ("rotary", 1, "number of a rotary table is 1, the kernels take 0 to 0"),
        ("query_rotary", 1, "number of a rotary table is 1, the kernels take 0 to 0"),
    ],
)
def test_a_block_that_does_not_fit(field, value, message):
    decoder = small_decoder()
    *path, name = field.split(".")
    setattr(attrgetter(*path)(decoder.struct.blocks[0]) if path else decoder.struct.blocks[0], name, value)
    with pytest.raises(LlmqatError, match=message):
        decode(decoder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 8 * HEAD_DIM}, "dim of a rotary table is 128, the kernels take 0 to 16"),
        ({"dim": 5}, "dim of a rotary table is 5, it must be even"),
        ({"past": -1}, "past is -1, the kernels take 0 to 8"),
        ({"past": 7}, "number of new tokens is 2, the kernels take 0 to 1"),
        ({"tokens": 9}, "number of new tokens is 9, the kernels take 0 to 8"),
    ],
)
def test_a_call_that_does_not_fit(changes, message):
    with pytest.raises(LlmqatError, match=message):
        decode(small_decoder(), **changes)


def test_a_cache_with_half_its_scales():
    cache = small_cache()
    cache.pointers[0].key_scale = cache.pointers[0].keys
    with pytest.raises(LlmqatError, match="a cache has scales of keys and of values, or none"):
        decode(small_decoder(), cache)


def test_a_rotary_table_of_another_dtype():
    greedy = GreedyDecoder(small_decoder(), torch.randn(VOCABULARY, HIDDEN), layer(VOCABULARY, HIDDEN))
    greedy.set_cache(small_cache(), [(torch.ones(ROOM, HEAD_DIM), torch.zeros(ROOM, HEAD_DIM))])
    greedy._used[1][0].dtype = native.DTYPES[torch.float16]
    with pytest.raises(LlmqatError, match="a rotary table has dtype number 2, the decoder takes 0 or its own, 0"):
        greedy(3, 0)


@pytest.mark.parametrize("dim", [0, 8])
def test_a_rotary_table_of_some_features(dim):
    assert decode(small_decoder(), dim=dim).isfinite().all()


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "float"])
@pytest.mark.parametrize(
    ("token", "past", "message"),
    [
        (-1, 0, "token is -1, the kernels take 0 to 49"),
        (VOCABULARY, 0, "token is 50, the kernels take 0 to 49"),
        (3, ROOM, "number of new tokens is 1, the kernels take 0 to 0"),
    ],
)
def test_greedy_steps_that_do_not_fit(packed, token, past, message):
    head = layer(VOCABULARY, HIDDEN)
    greedy = GreedyDecoder(small_decoder(), head if packed else torch.randn(VOCABULARY, HIDDEN), head)
    greedy.set_cache(small_cache(), [(torch.ones(ROOM, HEAD_DIM), torch.zeros(ROOM, HEAD_DIM))])
    assert 0 <= greedy(3, 0) < VOCABULARY
    with pytest.raises(LlmqatError, match=f"llmqat_next_token: {message}"):
        greedy(token, past)


LIMITED = """
import resource, sys, torch
from llmqat.errors import LlmqatError
from llmqat.kernels import native
from llmqat.kernels.packed import Packed
from llmqat.scheme import QuantScheme
from tests.kernels.test_ops import packed_layer
packed, *_ = packed_layer(64, 512, QuantScheme(4, 128), torch.bfloat16)
layer = native.Layer(Packed(*packed, None, 4, 512))

def limit(more):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))
"""


def run_limited(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", LIMITED + code]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


MANY_THREADS = """
x = torch.randn(64, 512).bfloat16()
torch.set_num_threads(1)
alone = layer.linear(x)
torch.set_num_threads(200)
limit(100 << 20)
together = layer.linear(x)
print(torch.equal(alone, together), *(torch.equal(alone, layer.linear(x)) for _ in range(2)))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")
def test_threads_that_cannot_be_started_are_done_without():
    done = run_limited(MANY_THREADS)
    assert done.stdout.split() == ["True", "True", "True"], done.stderr
    (line,) = done.stderr.splitlines()  # once, from the first call that knows
    assert re.fullmatch(
        r"the compiled kernels run on [0-9]+ threads, not 200: .*; ask for no more, by OMP_NUM_\w+", line
    )


NO_MEMORY = """
x, few = torch.randn(60000, 512).bfloat16(), torch.randn(3, 512).bfloat16()
expected = layer.linear(few)
for threads in (1, 2):
    torch.set_num_threads(threads)
    limit(40 << 20)
    try:
        layer.linear(x)
    except LlmqatError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert torch.equal(layer.linear(few), expected)
assert layer.linear(x).isfinite().all()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are those of Linux")
def test_memory_that_is_not_there_is_an_error():
    done = run_limited(NO_MEMORY)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("the kernels need" in line and "MB more memory than the system gives" in line for line in lines)


HUGE_COUNT = """
x = torch.randn(64, 512).bfloat16()
expected = layer.linear(x)
native.threads = lambda: 2**31 - 1
import os
assert torch.equal(layer.linear(x), expected)
print(len(os.listdir("/proc/self/task")) < 300)
"""


def test_no_more_threads_than_are_of_use():
    done = run_limited(HUGE_COUNT)
    assert done.stdout.strip() == "True", done.stderr
