import random

import pytest

from llmqat.data.splits import Corpus, assembled, hold_out


def words(count, seed):
    draw = random.Random(seed)
    return " ".join(draw.choice(["river", "stone", "copper", "window", "seven", "garden"]) for _ in range(count))


def sizes(corpus):
    return [sum(map(len, part)) for part in (corpus.train, corpus.validation, corpus.test)]


@pytest.mark.parametrize("count", [1, 2, 3, 30, 39, 45])
@pytest.mark.parametrize("length", [1, 2500])
def test_few_long_texts_without_line_breaks(count, length):
    texts = [words(length, seed) for seed in range(count)]
    corpus = hold_out(texts)
    parts = sizes(corpus)
    assert sum(parts) == sum(map(len, texts))
    assert all(parts)
    if length > 1:
        assert all(part >= 0.02 * sum(parts) for part in parts)
        assert parts[0] >= 0.85 * sum(parts)
        inside = [part for part in (*corpus.train, *corpus.validation, *corpus.test) if part not in texts]
        assert all(part.endswith(" ") for part in corpus.train if part in inside)  # between two words
    assert len(corpus.train) <= count


def test_texts_stay_documents():
    texts = [words(400, seed) for seed in range(30)]
    corpus = hold_out(texts)
    assert [*corpus.train, *corpus.validation, *corpus.test] == texts


def test_borders_never_leave_a_split_empty():
    corpus = hold_out(["0" * 10, "0" * 10, "0" * 17, "", "000"])
    assert sizes(corpus) == [37, 1, 2]


def test_one_long_text_among_many_short_ones():
    corpus = hold_out([words(100_000, 0), *(words(3, seed) for seed in range(60))])
    assert all(part >= 0.02 * sum(sizes(corpus)) for part in sizes(corpus))


@pytest.mark.parametrize("border", ["\n\n", "\n", ". ", "。", " "])
def test_a_text_is_cut_at_its_best_border(border):
    corpus = hold_out([border.join("x" * 40 for _ in range(1000))])
    assert corpus.train[0].endswith("x" + border)
    assert corpus.validation[0].endswith("x" + border)


def test_a_text_without_any_border():
    assert sizes(hold_out(["x" * 1000])) == [900, 50, 50]


def test_splits_under_other_names(capsys):
    assert assembled({"train": ["a"], "dev": ["b"], "test": ["c"]}, "set") == Corpus(["a"], ["b"], ["c"])
    parts = {"train": ["a"], "validation": ["b"], "val": ["x"], "test": ["c"], "extra": ["d"], "train_2": ["e"]}
    assert assembled(parts, "set") == Corpus(["a"], ["b"], ["c"])
    assert "set: beside train, extra, train_2 left out" in capsys.readouterr().err
