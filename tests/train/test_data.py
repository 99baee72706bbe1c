import json
from itertools import islice

import datasets
import pytest
import torch

from llmqat.errors import LlmqatError
from llmqat.train import stdlib_corpus
from llmqat.train.data import Corpus, EndlessSampler, blocks, cut, encode, load_corpus
from llmqat.train.stdlib_corpus import SPLITS, split_of, stdlib_files, stdlib_texts

ROWS = [f"row {i}\n" for i in range(60)]


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(path, rows, field="text"):
    """A dataset file of the kind its suffix says."""
    records = [{field: row, "n": i} for i, row in enumerate(rows)]
    if path.suffix == ".txt":
        path.write_text("".join(rows))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    elif path.suffix == ".json":
        path.write_text(json.dumps(records))
    else:
        datasets.Dataset.from_list(records).to_parquet(str(path))
    return path


def joined(corpus):
    return "".join("".join(split) for split in (corpus.train, corpus.validation, corpus.test))


def test_stdlib_splits_are_disjoint_and_deterministic():
    names = {split: [path.as_posix() for path in stdlib_files(split)] for split in SPLITS}
    assert names["test"] == [path.as_posix() for path in stdlib_files("test")]
    total = sum(map(len, names.values()))
    assert len(set().union(*names.values())) == total
    for split in ("validation", "test"):
        assert 0.02 < len(names[split]) / total < 0.10
    assert not [name for name in names["train"] if "/test/" in name or "/site-packages/" in name]


def test_stdlib_split_depends_on_the_relative_path_alone(monkeypatch, tmp_path):
    for name in ("ast.py", "json/decoder.py", "test/test_ast.py", "site-packages/x.py", "empty.py"):
        path = tmp_path / "lib" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("" if name == "empty.py" else name)
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
    texts = {text: split for split in SPLITS for text in stdlib_texts(split)}
    assert texts == {name: split_of(name) for name in ("ast.py", "json/decoder.py")}
    with pytest.raises(ValueError, match="unknown split 'dev' of the stdlib corpus; choose one of train"):
        next(stdlib_files("dev"))


def test_stdlib_corpus_shares_no_text_between_splits():
    corpus = load_corpus("stdlib")
    held_out = {*corpus.validation, *corpus.test}
    assert len(held_out) == len(corpus.validation) + len(corpus.test)
    assert not held_out & set(corpus.train)
    assert all(len("".join(part)) > 100_000 for part in (corpus.validation, corpus.test))


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet"])
def test_every_kind_of_file(tmp_path, suffix):
    corpus = load_corpus(str(write(tmp_path / f"data{suffix}", ROWS)))
    assert joined(corpus) == "".join(ROWS)
    assert all((corpus.train, corpus.validation, corpus.test))


def test_text_field(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS, field="body")
    assert joined(load_corpus(str(path), "body")) == "".join(ROWS)
    with pytest.raises(LlmqatError, match=r"a\.jsonl has no column 'text'; choose one of body, n by --text-field"):
        load_corpus(str(path))


def test_directory_is_read_in_order(tmp_path):
    folder = tmp_path / "data" / "sub"
    folder.mkdir(parents=True)
    write(folder / "b.jsonl", ROWS[30:])
    write(folder.parent / "a.txt", ROWS[:30])
    assert joined(load_corpus(str(folder.parent))) == "".join(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text\nx\n", r"cannot read .*a\.csv: llmqat knows \.txt, \.jsonl, \.json, \.parquet; convert it"),
        ("a.txt", " \n\n", r"dataset .*a\.txt holds no text to train on; check the file, or --text-field"),
        ("a.txt", "", r"holds no text to train on"),
        ("a.jsonl", '{"text": 7}\n{"text": 8}\n', r"holds no text to train on"),
        ("a.jsonl", "{broken", r"cannot parse .*a\.jsonl: "),
        ("a.parquet", "no parquet", r"cannot parse .*a\.parquet: "),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(LlmqatError, match=message):
        load_corpus(str(tmp_path / name))


@pytest.mark.parametrize("name", ["none.txt", "none.parquet", "./none", "/none/at/all"])
def test_missing_file(name):
    with pytest.raises(
        LlmqatError, match=f"dataset {name} does not exist; give an existing file or directory, a Hub id"
    ):
        load_corpus(name)


def test_hub_datasets(monkeypatch):
    asked = []

    def hub(name, config):
        asked.append((name, config))
        if name == "offline":
            raise ConnectionError("no network\nlong story")
        return {split: datasets.Dataset.from_dict({"text": ROWS}) for split in name.split("+")}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_corpus("train+validation+test:small") == Corpus(ROWS, ROWS, ROWS)
    assert load_corpus("train+test") == Corpus(cut(ROWS).train, cut(ROWS).validation, ROWS)
    assert load_corpus("other") == cut(ROWS)
    assert asked == [("train+validation+test", "small"), ("train+test", None), ("other", None)]
    with pytest.raises(LlmqatError, match=r"cannot load dataset offline from the Hub: no network; without a network"):
        load_corpus("offline")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 39, 40, 100])
def test_cut_holds_out_the_end_and_loses_nothing(count):
    documents = [f"{i}\n" for i in range(count)]
    corpus = cut(documents)
    assert joined(corpus) == "".join(documents)
    assert any(corpus.train)
    if count > 2:
        assert any(corpus.validation)
        assert any(corpus.test)
    if count >= 40:
        assert corpus.train == documents[: len(corpus.train)]
        assert len(corpus.validation) == len(corpus.test) == int(0.05 * count)


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
