"""The protocols of GPTQ's code, against loops written from their description."""

import copy
import random

import pytest
import torch
from tokenizers import processors

from llmqat.data.corpus import load_corpus
from llmqat.data.named_sets import NAMED_SETS
from llmqat.errors import LlmqatError
from llmqat.metrics.perplexity import evaluate, windows
from llmqat.metrics.published import scored_windows

WINDOW = 32


@pytest.fixture
def opening(tokenizer):
    """A tokenizer that opens each text with its BOS, as that of Llama does."""
    own = copy.deepcopy(tokenizer)
    opened = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    own.backend_tokenizer.post_processor = opened
    return own


def stream_of(name, hub, tokenizer):
    """Ids ``(1, n)`` that the published loop cuts into windows."""
    if name == "c4":
        random.seed(0)
        parts = []
        for _ in range(256):
            while True:
                document = hub["c4 validation"][random.randint(0, 1199)]
                ids = tokenizer(document, return_tensors="pt").input_ids.long()
                if ids.shape[1] > WINDOW:
                    break
            start = random.randint(0, ids.shape[1] - WINDOW - 1)
            parts.append(ids[:, start : start + WINDOW])
        return torch.hstack(parts)
    text = {
        "wikitext2": lambda: "\n\n".join(hub["wikitext2 test"]),
        "ptb": lambda: "\n\n".join(hub["ptb validation"]),
        "ptb-new": lambda: " ".join(hub["ptb test"]),
        "c4-new": lambda: " ".join(hub["c4 validation"][:1100]),
    }[name]()
    ids = tokenizer(text, return_tensors="pt").input_ids
    return ids[:, : 256 * WINDOW] if name == "c4-new" else ids


@torch.no_grad()
def loop(model, stream):
    """Perplexity as GPTQ's code sums it: mean loss of a window times its length, over all lengths."""
    count, total = stream.shape[1] // WINDOW, 0.0
    for i in range(count):
        batch = stream[:, i * WINDOW : (i + 1) * WINDOW]
        logits = model(batch).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, batch[0, 1:]).float() * WINDOW
    return float(torch.exp(torch.as_tensor(total / (count * WINDOW))))


@pytest.mark.parametrize("opened", [True, False], ids=["bos", "plain"])
@pytest.mark.parametrize("name", list(NAMED_SETS))
def test_windows_and_perplexity_are_the_published_ones(papers_hub, tiny_llama, tokenizer, opening, name, opened):
    tokenizer, model = opening if opened else tokenizer, tiny_llama(vocab_size=258)
    stream = stream_of(name, papers_hub, tokenizer)
    data = scored_windows(name, tokenizer, WINDOW)
    count = stream.shape[1] // WINDOW
    assert torch.equal(data.ids, stream[0, : count * WINDOW].view(count, WINDOW))
    assert int(data.ids[0, 0]) == 0 or not opened or name == "c4"
    if name.startswith("c4"):
        assert count == 256
    assert evaluate(model, data).perplexity == pytest.approx(loop(model, stream), rel=1e-5)
    assert data.protocol == f"{name} as in GPTQ, {count} windows of 32, BOS tokenizer"


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_other_rules(papers_hub, tokenizer, name):
    every = scored_windows(name, tokenizer, WINDOW, 5 * WINDOW + 3, "window")
    assert every.ids.shape == (5, WINDOW)
    assert every.ids[:, 0].eq(0).all()
    assert not every.ids[:, 1:].eq(0).any()
    stream = scored_windows(name, tokenizer, WINDOW, bos="stream")
    none = scored_windows(name, tokenizer, WINDOW, bos="none")
    assert len({data.sha256 for data in (every, stream, none)}) == 3
    if name == "wikitext2":
        assert torch.equal(stream.ids.flatten()[1:], none.ids.flatten()[: stream.ids.numel() - 1])


def test_c4_new_ends_with_its_1100th_document(papers_hub, tokenizer):
    """A letter is a token here, and this window is too long for 256 of them."""
    joined = " ".join(papers_hub["c4 validation"][:1100])
    assert len(scored_windows("c4-new", tokenizer, 256, bos="none").ids) == len(joined) // 256


def test_errors(papers_hub, tokenizer):
    with pytest.raises(LlmqatError, match="no c4 evaluation text has more than 2048 tokens; give a smaller --window"):
        scored_windows("c4", tokenizer)
    with pytest.raises(LlmqatError, match=r"the ptb evaluation text has .* tokens, fewer than one window of 2048"):
        scored_windows("ptb", tokenizer)
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = None
    with pytest.raises(LlmqatError, match="--bos window needs a tokenizer with a BOS token"):
        scored_windows("c4", tokenizer, WINDOW, bos="window")


def test_any_other_dataset_is_cut_as_ever(text_file, tokenizer):
    data = scored_windows(str(text_file), tokenizer, WINDOW, 320, "stream")
    documents = load_corpus(str(text_file)).test
    assert torch.equal(data.ids, windows(tokenizer, documents, WINDOW, 320).ids)
    assert data.name is None
