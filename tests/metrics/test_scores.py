import pytest
import torch

from llmqat.metrics.scores import token_scores
from llmqat.models import output_head
from llmqat.models.output_head import cached


def example(tokens=7, vocabulary=1000, spread=0.1):
    generator = torch.Generator().manual_seed(0)
    t = torch.randn(tokens, vocabulary, generator=generator) * 4 + 50
    s = t + spread * torch.randn(tokens, vocabulary, generator=generator)
    return s, torch.arange(tokens) * 31 % vocabulary, t


def by_definition(s, following, t):
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    loss = -log_q.gather(-1, following.unsqueeze(-1)).squeeze(-1)
    return torch.stack([loss, (log_p.exp() * (log_p - log_q)).sum(-1), log_p.argmax(-1) == log_q.argmax(-1)])


@pytest.mark.parametrize("spread", [1.0, 0.01])
def test_scores_are_as_near_to_float64_as_two_log_softmaxes(spread):
    s, following, t = example(tokens=200, spread=spread)
    exact = by_definition(s.double(), following, t.double())
    lost = (by_definition(s, following, t) - exact).abs().amax(1)
    found = (token_scores(s, following, t) - exact).abs().amax(1)
    assert (found <= lost).all()
    assert exact[1].mean() > 1e-6


def test_few_rows_at_a_time_score_the_same(monkeypatch):
    s, following, t = example()
    monkeypatch.setattr(output_head, "CACHED_LOGITS", 2500)
    slices = list(cached(s))
    assert [len(range(7)[few]) for few in slices] == [2, 2, 2, 1]
    parts = [token_scores(s[few], following[few], t[few]) for few in slices]
    assert torch.equal(torch.cat(parts, 1), token_scores(s, following, t))
    monkeypatch.setattr(output_head, "CACHED_LOGITS", 10)
    assert [len(range(7)[few]) for few in cached(s)] == [1] * 7  # a token at least


def test_a_model_beside_itself_and_alone():
    s, following, _ = example()
    loss, kl, agree = token_scores(s, following, s)
    assert kl.eq(0).all()
    assert agree.eq(1).all()
    assert torch.equal(token_scores(s, following, None), torch.stack([loss, kl, kl]))


def test_logits_are_not_changed():
    """They may be what the model itself returned."""
    s, following, t = example()
    before = s.clone(), t.clone()
    token_scores(s, following, t)
    assert torch.equal(s, before[0])
    assert torch.equal(t, before[1])


def test_half_precision_is_scored_in_float32():
    s, following, t = (x.bfloat16() if x.is_floating_point() else x for x in example())
    assert torch.equal(token_scores(s, following, t), token_scores(s.float(), following, t.float()))
