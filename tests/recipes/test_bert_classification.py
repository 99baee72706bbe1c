"""`recipes/bert_classification.py`, run as a user runs it, on a tiny BERT that was fine-tuned on rows made here."""

import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import llmqat

SCRIPT = Path(__file__).parents[2] / "recipes" / "bert_classification.py"
WORDS = [f"word{index}" for index in range(60)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def rows(count, seed):
    """Sentences of 6 to 14 words, each of a hidden worth; the label is the sign of their sum."""
    draw = random.Random(seed)
    for _ in range(count):
        words = draw.choices(range(len(WORDS)), k=draw.randint(6, 14))
        worth = sum((index * 7) % 13 - 6 for index in words)
        yield {"sentence": " ".join(WORDS[index] for index in words), "label": int(worth > 0)}


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Training and test rows as files."""
    folder = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train", 400, 1), ("test", 400, 2)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(count, seed)))
    return folder


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A BERT of two layers, fine-tuned on rows of the same kind, and its tokenizer."""
    torch.manual_seed(0)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=64, **names)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=64, **sizes))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    learned = list(rows(6400, 3))
    for start in range(0, len(learned), 64):
        batch = learned[start : start + 64]
        encoded = tokenizer([row["sentence"] for row in batch], padding=True, return_tensors="pt")
        model(**encoded, labels=torch.tensor([row["label"] for row in batch])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("models") / "bert"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_is_trained_through_the_grid_and_shipped(classifier, reviews, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "argv", [SCRIPT.name, *map(str, (classifier, reviews / "train.jsonl", reviews / "test.jsonl", out))]
    )
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    accuracy = {name: float(value) for name, value in re.findall(r"^(\w+) ([\d.]+)$", printed, re.MULTILINE)}
    assert list(accuracy) == ["float", "rounded", "trained", "packed"]
    assert accuracy["float"] > 0.85
    assert accuracy["trained"] >= accuracy["rounded"]
    assert accuracy["packed"] == accuracy["trained"]
    assert llmqat.verify(out).ok
    assert isinstance(llmqat.load(out), BertForSequenceClassification)
