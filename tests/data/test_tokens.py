from itertools import islice

import pytest
import torch

from llmqat.data.tokens import EndlessSampler, blocks, encode
from llmqat.errors import LlmqatError


def test_encode_joins_and_limits(tokenizer):
    documents = ["ab", "c", "d" * 10]
    stream = encode(tokenizer, documents)
    assert stream.dtype == torch.long
    assert tokenizer.decode(stream) == "abc" + "d" * 10
    assert torch.equal(encode(tokenizer, documents, 5), stream[:5])


def test_blocks():
    assert blocks(torch.arange(11), 4, "training").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    message = (
        "the training text has 3 tokens, fewer than one sequence of 4; give more text or a shorter --length or --window"
    )
    with pytest.raises(LlmqatError, match=message):
        blocks(torch.arange(3), 4, "training")


@pytest.mark.parametrize(("count", "size"), [(10, 3), (7, 7), (3, 8), (1, 2)])
def test_sampler_sees_each_block_once_an_epoch_and_resumes_anywhere(count, size):
    steps = 12
    full = list(islice(EndlessSampler(count, size, 5), steps))
    assert all(len(batch) == size for batch in full)
    flat = [index for batch in full for index in batch]
    for start in range(0, len(flat) - count + 1, count):
        assert sorted(flat[start : start + count]) == list(range(count))
    for first in range(steps):
        assert list(islice(EndlessSampler(count, size, 5, first), steps - first)) == full[first:]


def test_sampler_shuffles_by_seed_and_epoch():
    def order(seed):
        return list(islice(EndlessSampler(20, 20, seed), 3))

    assert order(0) == order(0)
    assert len({tuple(epoch) for seed in (0, 1) for epoch in order(seed)}) == 6
