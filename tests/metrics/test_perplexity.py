import copy
import hashlib
import math
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from llmqat.errors import LlmqatError
from llmqat.formats.reader import load_packed
from llmqat.formats.writer import save_packed
from llmqat.metrics import perplexity as module
from llmqat.metrics.perplexity import Perplexity, Windows, bootstrap_difference, evaluate, windows
from llmqat.models.float_view import FloatCopy
from llmqat.models.patcher import prepare, round_float_parts
from llmqat.scheme import QuantScheme

DATA = Windows(torch.randint(0, 128, (7, 16), generator=torch.Generator().manual_seed(0)), "none")


class Constant(nn.Module):
    """The same logits at every position."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


@pytest.mark.parametrize("vocab", [2, 128, 1000])
def test_uniform_logits_give_the_vocabulary(vocab):
    result = evaluate(Constant(torch.full((vocab,), 3.0)), Windows(torch.zeros(3, 9, dtype=torch.long), "none"))
    assert result.perplexity == pytest.approx(vocab, rel=1e-6)
    assert result.losses.shape == (3,)
    assert (result.kl_to_float, result.top1_agreement) == (None, None)


def test_only_shifted_targets_count():
    """The first token of each window is context: only it may be improbable for free."""
    model = Constant(torch.tensor([0.0, 30.0]))
    assert evaluate(model, Windows(torch.tensor([[0, 1, 1, 1]]), "none")).perplexity == pytest.approx(1.0)
    result = evaluate(model, Windows(torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), "none"))
    np.testing.assert_allclose(result.losses, [30.0 / 3, 0.0], atol=1e-6)
    assert result.perplexity == pytest.approx(math.exp(5.0))  # mean over windows, then the exponential


def test_counts_targets(monkeypatch, tiny_llama):
    counted, original = [], torch.Tensor.gather

    def gather(self, dim, index):
        counted.append(index.numel())
        return original(self, dim, index)

    monkeypatch.setattr(torch.Tensor, "gather", gather)
    evaluate(tiny_llama(), DATA)
    assert sum(counted) == 7 * 15
    assert DATA.tokens == 7 * 16


def test_equals_the_loss_of_transformers(tiny_llama):
    model = tiny_llama()
    for row in DATA.ids:
        with torch.no_grad():
            loss = float(model(input_ids=row[None], labels=row[None]).loss)
        assert evaluate(model, Windows(row[None], "none")).losses[0] == pytest.approx(loss, rel=1e-6)


def test_batches_change_nothing(tiny_llama, monkeypatch):
    model, reference = tiny_llama(), FloatCopy(tiny_llama())
    prepare(model, QuantScheme(4, 32))
    whole = evaluate(model, DATA, reference)
    for tokens in (1, 16, 40):
        monkeypatch.setattr(module, "BATCH_TOKENS", tokens)
        part = evaluate(model, DATA, reference)
        np.testing.assert_allclose(part.losses, whole.losses, rtol=1e-6)
        assert part.kl_to_float == pytest.approx(whole.kl_to_float, rel=1e-5)
        assert part.top1_agreement == whole.top1_agreement


def test_nothing_separates_a_model_from_itself(tiny_llama):
    result = evaluate(tiny_llama(), DATA, FloatCopy(tiny_llama()))
    assert result.kl_to_float == 0
    assert result.top1_agreement == 1


def test_kl_and_agreement_equal_torch(tiny_llama):
    model, teacher = tiny_llama(), tiny_llama()
    prepare(model, QuantScheme(2, 32))
    with torch.no_grad():
        q = model(input_ids=DATA.ids).logits[:, :-1].double().log_softmax(-1)
        p = teacher(input_ids=DATA.ids).logits[:, :-1].double().log_softmax(-1)
    result = evaluate(model, DATA, FloatCopy(teacher))
    assert result.kl_to_float == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert result.kl_to_float > 0.01
    assert result.top1_agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert result.top1_agreement < 1


@pytest.mark.parametrize(
    "scheme", [QuantScheme(4, 32), QuantScheme(3, -1, False), QuantScheme(8, 32, act_bits=8)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_equals_fake_quantized(tiny_llama, tmp_path, scheme, dtype):
    model = tiny_llama()
    prepare(model, scheme, storage_dtype=dtype)
    round_float_parts(model)
    packed = load_packed(save_packed(model, tmp_path), torch.float32)
    assert evaluate(packed, DATA).perplexity == pytest.approx(evaluate(model, DATA).perplexity, rel=1e-6)


def test_evaluation_restores_the_mode(tiny_llama):
    model = tiny_llama()
    for training in (True, False):
        evaluate(model.train(training), DATA)
        assert model.training == training
    assert all(p.requires_grad for p in model.parameters())


def test_non_finite_loss():
    with pytest.raises(LlmqatError, match="the model's loss is not finite; check its weights and dtype"):
        evaluate(Constant(torch.tensor([0.0, float("nan")])), Windows(torch.zeros(1, 4, dtype=torch.long), "none"))


DOCUMENTS = ["abcdef", "ghij"]
STREAM = "abcdef\n\nghij"  # 12 tokens, one per byte


def text_of(tokenizer, data):
    return [tokenizer.decode(row) for row in data.ids]


@pytest.mark.parametrize(
    ("bos", "window", "rows"),
    [
        ("none", 4, ["abcd", "ef\n\n", "ghij"]),
        ("none", 5, ["abcde", "f\n\ngh"]),
        ("stream", 4, ["<s>abc", "def\n", "\nghi"]),
        ("window", 4, ["<s>abc", "<s>def", "<s>\n\ng", "<s>hij"]),
        ("window", 8, ["<s>abcdef\n"]),
    ],
)
def test_bos_rules(tokenizer, bos, window, rows):
    data = windows(tokenizer, DOCUMENTS, window, 100, bos)
    assert text_of(tokenizer, data) == rows
    assert data.bos == bos
    assert data.ids.shape[1] == window


def test_no_bos_token(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    assert text_of(tokenizer, windows(tokenizer, DOCUMENTS, 6, 100, "stream")) == ["abcdef", "\n\nghij"]
    with pytest.raises(LlmqatError, match="--bos window needs a tokenizer with a BOS token; use --bos stream or none"):
        windows(tokenizer, DOCUMENTS, 6, 100, "window")


@pytest.mark.parametrize(("limit", "count"), [(100, 3), (11, 2), (8, 2), (4, 1), (1, 1)])
def test_limit_of_tokens(tokenizer, limit, count):
    assert len(windows(tokenizer, DOCUMENTS, 4, limit, "none").ids) == count


@pytest.mark.parametrize(("window", "bos"), [(1, "none"), (0, "stream"), (8, "Stream"), (8, None)])
def test_windows_and_rules_that_do_not_exist(tokenizer, window, bos):
    message = rf"2 tokens or more, and bos is one of stream, .*; got window {window}, bos {bos!r}"
    with pytest.raises(LlmqatError, match=message):
        windows(tokenizer, DOCUMENTS, window, None, bos)


def test_text_shorter_than_a_window(tokenizer):
    with pytest.raises(LlmqatError, match="there is no test text: the dataset has too few rows to hold any out"):
        windows(tokenizer, [], 20, None, what="test")
    message = "the evaluation text has 13 tokens, fewer than one window of 20; give more text or a smaller --window"
    with pytest.raises(LlmqatError, match=message):
        windows(tokenizer, DOCUMENTS, 20, 100)


def test_hash_is_of_the_ids():
    data = Windows(torch.tensor([[1, 2], [3, 4]]), "none")
    assert data.sha256 == hashlib.sha256(struct.pack("<4q", 1, 2, 3, 4)).hexdigest()
    assert data.sha256 == Windows(torch.tensor([[1, 3], [2, 4]]).T, "none").sha256
    assert data.sha256 != Windows(torch.tensor([[1, 2], [3, 5]]), "none").sha256


def test_bootstrap_interval_covers_the_difference():
    draw = np.random.default_rng(0)
    base = draw.normal(3.0, 0.5, 200)
    a, b = Perplexity(base + draw.normal(0.02, 0.01, 200)), Perplexity(base)
    low, high = bootstrap_difference(a, b)
    assert low < a.perplexity - b.perplexity < high
    assert low > 0  # paired: the spread between windows does not hide a small difference
    assert bootstrap_difference(a, b) == (low, high)
    assert bootstrap_difference(b, a) == pytest.approx((-high, -low))
    assert bootstrap_difference(b, b) == (0, 0)


def test_bootstrap_interval_has_its_coverage():
    """Samples of a known population: about 95 of 100 intervals hold the true difference."""
    draw, covered = np.random.default_rng(1), 0
    samples = 40
    true = math.exp(1.1) - math.exp(1.0)
    for _ in range(samples):
        base = draw.normal(1.0, 0.2, 100)
        low, high = bootstrap_difference(Perplexity(base + draw.normal(0.1, 0.1, 100)), Perplexity(base))
        covered += low <= true <= high
    assert 0.85 * samples <= covered < samples


def conversations(*answers, length=16):
    """Random ids with labels on the last tokens before a padding of one token."""
    ids = torch.randint(0, 128, (len(answers), length), generator=torch.Generator().manual_seed(3))
    labels = torch.full_like(ids, -100)
    for row, count in enumerate(answers):
        labels[row, length - 1 - count : length - 1] = ids[row, length - 1 - count : length - 1]
    return Windows(torch.stack([ids, labels], 1), "template")


def test_conversations_are_scored_by_their_answers(tiny_llama):
    model, data = tiny_llama(), conversations(1, 5, 9)
    reference = tiny_llama(num_hidden_layers=1)
    result = evaluate(model, data, FloatCopy(reference))
    ids, labels = data.ids.unbind(1)
    with torch.no_grad():
        log_q, log_p = (torch.log_softmax(m(input_ids=ids).logits[:, :-1], -1) for m in (model, reference))
    scored = labels[:, 1:] != -100
    losses = -log_q.gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert result.targets == (1, 5, 9)
    assert result.perplexity == pytest.approx(float(losses[scored].double().mean().exp()), rel=1e-5)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[scored].mean()
    assert result.kl_to_float == pytest.approx(float(kl), rel=1e-5)
    same = (log_p.argmax(-1) == log_q.argmax(-1))[scored].double().mean()
    assert result.top1_agreement == pytest.approx(float(same))
    assert evaluate(model, data).targets == result.targets
    assert evaluate(model, DATA).targets is None


def test_bootstrap_weighs_conversations_by_their_answers():
    long, short = np.full(50, 2.0), np.full(50, 1.0)
    losses, targets = np.concatenate([long, short]), (30,) * 50 + (10,) * 50
    a, b = Perplexity(losses, targets=targets), Perplexity(np.zeros(100), targets=targets)
    assert a.perplexity == pytest.approx(math.exp(0.75 * 2 + 0.25 * 1))
    low, high = bootstrap_difference(a, b)
    assert low < a.perplexity - 1 < high
    assert high - low < 1.5


def test_conversations_say_what_they_are(tokenizer):
    own = copy.deepcopy(tokenizer)
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "answer"}]
    data = windows(own, [talk] * 5, 60, 100)
    assert data.bos == "template"
    assert data.protocol == "3 conversations, 21 answer tokens scored"
    text = own.apply_chat_template(talk, tokenize=False)
    assert data.tokens == 3 * len(own(text, add_special_tokens=False)["input_ids"])
    masked = Windows(data.ids.clone(), "template")
    masked.ids[0, 1] = -100
    assert masked.sha256 != data.sha256
    with pytest.raises(
        LlmqatError, match=r"no answer token of the my\.jsonl evaluation conversations is left within 9"
    ):
        windows(own, [talk], 9, 100, what="my.jsonl evaluation")
    assert windows(own, ["x" * 99], 16, 64).protocol == "windows of 16 without overlap, BOS stream"
