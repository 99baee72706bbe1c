import copy
from itertools import islice

import pytest
import torch

from llmqat.data.tokens import EndlessSampler, encode, sequences, split_stream
from llmqat.errors import LlmqatError


def test_encode_joins_and_limits(tokenizer):
    documents = ["ab", "c", "d" * 10]
    stream = encode(tokenizer, documents)
    assert stream.dtype == torch.long
    assert tokenizer.decode(stream) == "abc" + "d" * 10
    assert torch.equal(encode(tokenizer, documents, 5), stream[:5])


def test_blocks():
    assert split_stream(torch.arange(11), 4, "training").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    message = (
        "the training text has 3 tokens, fewer than one sequence of 4; give more text or a shorter --length or --window"
    )
    with pytest.raises(LlmqatError, match=message):
        split_stream(torch.arange(3), 4)
    with pytest.raises(LlmqatError, match="the test text has 3 tokens"):
        split_stream(torch.arange(3), 4, what="test")


def test_an_opening_stands_before_every_sequence(tokenizer):
    assert split_stream(torch.arange(11), 4, opening=99).tolist() == [[99, 0, 1, 2], [99, 3, 4, 5], [99, 6, 7, 8]]
    with pytest.raises(LlmqatError, match="sequences of 1 token or more"):
        split_stream(torch.arange(11), 1, opening=99)
    plain, opened = (sequences(tokenizer, ["abcdefgh" * 4], 8, bos=bos) for bos in ("stream", "window"))
    assert opened[:, 0].unique().tolist() == [tokenizer.bos_token_id]
    assert torch.equal(opened[:, 1:].flatten()[:16], plain.flatten()[:16])  # no token of the text is lost
    other = copy.deepcopy(tokenizer)
    other.bos_token = None
    with pytest.raises(LlmqatError, match="--bos window needs a tokenizer with a BOS token"):
        sequences(other, ["abcdefgh" * 4], 8, bos="window")


@pytest.mark.parametrize(("stream", "length"), [(torch.arange(8), 0), (torch.arange(8), -2), (torch.zeros(2, 4), 2)])
def test_what_is_no_stream_or_length(stream, length):
    message = r"a stream of ids \(tokens,\) is cut into sequences of 1 token or more; got shape \(.*\) and length"
    with pytest.raises(LlmqatError, match=message):
        split_stream(stream, length)


def test_documents_that_cannot_be_tokenized(tokenizer):
    with pytest.raises(LlmqatError, match=r"a text holds half a character \(a lone surrogate, at 2\); decode"):
        encode(tokenizer, ["ab\ud83d"])
    with pytest.raises(LlmqatError, match="documents must be a list of texts or conversations; got one text"):
        encode(tokenizer, "text")


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
