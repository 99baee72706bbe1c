"""Dense copies of a packed model: the numbers of whole matrices, and no such matrices in memory."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmqat.formats import dense as dense_module
from llmqat.formats.dense import as_written, dense_copy, in_float64, nudge
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.metrics.live_bytes import LiveBytes
from llmqat.models.patcher import prepare
from llmqat.nn.embedding import PackedEmbedding
from llmqat.nn.packed_linear import packed_layers
from llmqat.quant.affine import dequantize
from llmqat.scheme import QuantScheme

IDS = torch.arange(24).view(2, 12)


@pytest.fixture
def load(small_llama, tmp_path):
    """``load(head_bits, tied, symmetric)``: a model with that head, packed and loaded."""

    def make(head_bits=None, tied=False, symmetric=True, **sizes):
        model = small_llama(tie_word_embeddings=tied, **sizes)
        scheme = QuantScheme(4, 16, symmetric)
        prepare(model, scheme, storage_dtype=torch.bfloat16, lm_head_bits=head_bits)
        return load_packed(save_packed(model, tmp_path), torch.float32)

    return make


def whole_copy(model, dtype):
    """A copy whose every matrix is there in `dtype`."""
    whole, lookup = copy.deepcopy(model), None
    for name, layer in packed_layers(model).items():
        weight = dequantize(*layer.unpack(), layer.scheme)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(weight)
        lookup = nn.Embedding.from_pretrained(weight)
        whole.set_submodule(name, linear)
    if isinstance(model.get_input_embeddings(), PackedEmbedding):
        whole.set_input_embeddings(lookup)  # of the last layer, the head
    whole.to(dtype)
    if dtype == torch.float64:
        whole.forward = partial(in_float64, whole.forward, False)
    return whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("head_bits", "tied", "symmetric"), [(None, True, True), (None, False, True), (4, True, False)]
)
def test_numbers_are_those_of_whole_matrices(load, monkeypatch, dtype, head_bits, tied, symmetric):
    model = load(head_bits, tied, symmetric)
    expected = whole_copy(model, dtype)(input_ids=IDS).logits
    assert torch.equal(dense_copy(model, dtype)(input_ids=IDS).logits, expected)
    monkeypatch.setattr(dense_module, "MADE_AT_ONCE", 5 * 48)  # five rows of the head
    found = dense_copy(model, dtype)(input_ids=IDS).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(("head_bits", "tied"), [(None, False), (None, True), (4, True)])
def test_ends_are_not_copied(load, monkeypatch, head_bits, tied):
    """Neither copy has matrices of its own, and a forward makes some rows at a time."""
    model, most = load(head_bits, tied, vocab_size=6000), 80 * 48
    monkeypatch.setattr(dense_module, "MADE_AT_ONCE", most)
    live = LiveBytes([*model.parameters(), *model.buffers()])
    held = live.current
    with torch.no_grad(), live.counting():
        for dtype in (torch.float32, torch.float64):
            assert dense_copy(model, dtype)(input_ids=IDS[:1, :2]).logits.dtype == dtype
    # Rows in float64 and in the dtype of the file, codes, unpacked and packed; and the logits of two tokens.
    assert live.peak - held < 24 * most + 4 * 8 * 2 * 6000 < 8 * 6000 * 48 / 4


@pytest.mark.parametrize(("head_bits", "tied"), [(None, False), (None, True), (4, True)])
def test_nudged_embeddings_are_not_shared(load, monkeypatch, head_bits, tied):
    """Drawn in parts, noise is that of the whole matrix; a tied float head moves with it, and the model stays."""
    model = load(head_bits, tied)
    before, plain = model(input_ids=IDS).logits, dense_copy(model, torch.float32)
    weight = plain.get_input_embeddings().weight.clone()
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2))
    for most in (dense_module.MADE_AT_ONCE, 32 * 48):
        monkeypatch.setattr(dense_module, "MADE_AT_ONCE", most)
        plain = dense_copy(model, torch.float32)
        nudge(plain)
        assert torch.equal(plain.get_input_embeddings().weight, weight * (1 + dense_module.NUDGE * noise))
        head = plain.get_output_embeddings().weight
        assert (head is plain.get_input_embeddings().weight) == (tied and head_bits is None)
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert not torch.equal(plain(input_ids=IDS).logits, dense_copy(model, torch.float32)(input_ids=IDS).logits)


def test_a_family_that_casts_to_float32_is_compared_in_float64():
    """Its weights are of float64 there, and so is all that it computes; but for what a layer does on purpose."""
    weight = torch.randn(8, 8, dtype=torch.float64)

    def forward(x):
        y = (x.float() + torch.full((), 1 / 3)).to(torch.float32) @ weight
        with as_written():
            assert x.float().dtype == torch.float32
        return torch.softmax(y, -1, dtype=torch.float32)

    x = torch.randn(3, 8, dtype=torch.float64)
    expected = torch.softmax((x + 1 / 3) @ weight, -1)
    for ties in (False, True):
        torch.testing.assert_close(in_float64(forward, ties, x), expected, rtol=1e-14, atol=1e-14)
    assert torch.get_default_dtype() == torch.float32
    assert in_float64(lambda x: x.float() / 3, True, x).dtype == torch.float32, "rounded as everywhere"
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        in_float64(lambda x: x @ x, False, x)
