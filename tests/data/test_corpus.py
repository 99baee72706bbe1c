import csv
import json

import datasets
import pytest

from llmqat.data import stdlib
from llmqat.data.corpus import load_corpus
from llmqat.data.splits import Corpus, hold_out
from llmqat.data.stdlib import SPLITS, split_of, stdlib_files, stdlib_texts
from llmqat.errors import LlmqatError

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
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, [field, "n"])
            table.writeheader()
            table.writerows(records)
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
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda _: str(tmp_path / "lib"))
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


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".parquet", ".csv"])
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
        (
            "a.md",
            "text\nx\n",
            r"cannot read .*a\.md: llmqat knows \.txt, \.jsonl, \.json, \.parquet, \.csv; convert it",
        ),
        ("a.txt", " \n\n", r"dataset .*a\.txt holds no text to train on; check the file, or --text-field"),
        ("a.txt", "", r"holds no text to train on"),
        (
            "a.jsonl",
            '{"text": 7}\n{"text": 8}\n',
            r"train on \(2 rows left out; the first one, a\.jsonl line 1: text is int",
        ),
        ("a.jsonl", "{broken", r"train on \(1 rows left out; the first one, a\.jsonl line 1: not JSON \(Expecting"),
        (
            "a.json",
            "[{broken",
            r"cannot parse .*a\.json: not JSON \(Expecting prop.*; mend it, or write one object per",
        ),
        ("a.json", "", r"holds no text to train on"),
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

    def hub(name, config, streaming):
        asked.append((name, config))
        if name == "offline":
            raise ConnectionError("no network\nlong story")
        return {split: datasets.Dataset.from_dict({"text": ROWS}) for split in name.split("+")}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert load_corpus("train+validation+test:small") == Corpus(ROWS, ROWS, ROWS)
    assert load_corpus("train+test") == Corpus(hold_out(ROWS).train, hold_out(ROWS).validation, ROWS)
    assert load_corpus("other") == hold_out(ROWS)
    assert load_corpus("train_sft+test_sft") == Corpus(hold_out(ROWS).train, hold_out(ROWS).validation, ROWS)
    assert asked == [
        ("train+validation+test", "small"),
        ("train+test", None),
        ("other", None),
        ("train_sft+test_sft", None),
    ]
    with pytest.raises(LlmqatError, match=r"offline from the Hub: no network long story; without a network, give a"):
        load_corpus("offline")


@pytest.mark.parametrize("count", [1, 2, 3, 10, 39, 40, 100])
def test_cut_holds_out_the_end_and_loses_nothing(count):
    documents = [f"{i}\n" for i in range(count)]
    corpus = hold_out(documents)
    assert joined(corpus) == "".join(documents)
    assert any(corpus.train)
    if count > 2:
        assert any(corpus.validation)
        assert any(corpus.test)
    if count >= 40:
        assert corpus.train == documents[: len(corpus.train)]
        assert len(corpus.validation) == len(corpus.test) == int(0.05 * count)


def talk(number, answer="fine"):
    return {"messages": [{"role": "user", "content": f"question {number}"}, {"role": "assistant", "content": answer}]}


def write_lines(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_conversations_are_held_out_whatever_their_order(tmp_path, capsys):
    talks = [talk(number) for number in range(60)]
    one = load_corpus(str(write_lines(tmp_path / "a.jsonl", talks)))
    other = load_corpus(str(write_lines(tmp_path / "b.jsonl", reversed(talks))))
    assert one == other
    assert one.is_chat
    assert (len(one.train), len(one.validation), len(one.test)) == (54, 3, 3)
    everything = [*one.train, *one.validation, *one.test]
    assert sorted(map(str, everything)) == sorted(str(row["messages"]) for row in talks)
    assert [row["messages"] for row in talks][-3:] != one.test
    assert (
        "a.jsonl: 60 conversations (messages); only answers count in losses and perplexity" in capsys.readouterr().err
    )


def test_bad_rows_are_counted_and_the_first_is_explained(tmp_path, capsys):
    path = write_lines(tmp_path / "a.jsonl", [talk(0), {"messages": "no"}, talk(1), talk(2, " "), talk(3), talk(4)])
    path.write_text(path.read_text() + "{half\n[1]\n")
    assert len(load_corpus(str(path)).train) == 2
    told = f"{path}: 4 of 8 rows left out; the first one, a.jsonl line 2: messages is str, not a list of messages"
    assert told in capsys.readouterr().err
    write_lines(path, [talk(0)])
    load_corpus(str(path))
    assert "left out" not in capsys.readouterr().err


def test_a_dataset_of_mostly_bad_rows_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [talk(0), {"messages": "no"}, talk(1, "")])
    message = r"a\.jsonl: 2 of 3 rows cannot be used, more than 50%; the first one, a\.jsonl line 2: messages is str"
    with pytest.raises(LlmqatError, match=message):
        load_corpus(str(path))


def test_rows_may_be_read_as_text(tmp_path):
    rows = [{"instruction": "add", "output": str(i), "text": f"row {i}\n"} for i in range(60)]
    path = str(write_lines(tmp_path / "a.jsonl", rows))
    assert load_corpus(path).is_chat
    assert joined(load_corpus(path, rows="text")) == "".join(row["text"] for row in rows)
    assert joined(load_corpus(path, "instruction", rows="text")) == "add" * 60
    with pytest.raises(LlmqatError, match=r"rows must be one of auto, text, chat; got 'speech'"):
        load_corpus(path, rows="speech")
    plain = str(write_lines(tmp_path / "b.jsonl", [{"text": "x", "n": 1}]))
    with pytest.raises(LlmqatError, match=r"b\.jsonl has no conversations: its columns are text, n; llmqat knows mess"):
        load_corpus(plain, rows="chat")


def test_texts_and_conversations_do_not_mix(tmp_path):
    write_lines(tmp_path / "a.jsonl", [talk(0)])
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(LlmqatError, match=r"mixes texts and conversations \(.*b\.txt differs.*--rows text"):
        load_corpus(str(tmp_path))


def test_names_of_files_and_folders_tell_the_splits(tmp_path):
    for name in ("train/1.jsonl", "train/2.jsonl", "wiki.valid.jsonl", "more.jsonl", "test.jsonl"):
        write_lines(tmp_path / name, [{"text": f"{name}\n"}])
    corpus = load_corpus(str(tmp_path))
    assert corpus.train == ["more.jsonl\n", "train/1.jsonl\n", "train/2.jsonl\n"]
    assert (corpus.validation, corpus.test) == (["wiki.valid.jsonl\n"], ["test.jsonl\n"])


def test_other_files_of_a_directory_are_left_out_and_named(tmp_path, capsys):
    write(tmp_path / "a.txt", ROWS)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "README.md").write_text("about")
    assert joined(load_corpus(str(tmp_path))) == "".join(ROWS)
    assert "1 other files left out, such as README.md" in capsys.readouterr().err
    (tmp_path / "a.txt").unlink()
    with pytest.raises(LlmqatError, match=r"directory .* holds no file that llmqat can read; it knows \.txt"):
        load_corpus(str(tmp_path))


def test_max_rows(tmp_path):
    path = write(tmp_path / "a.jsonl", ROWS)
    assert joined(load_corpus(str(path), max_rows=7)) == "".join(ROWS[:7])


def test_a_dataset_saved_to_disk(tmp_path):
    rows = datasets.Dataset.from_dict({"text": ROWS})
    rows.save_to_disk(str(tmp_path / "one"))
    assert load_corpus(str(tmp_path / "one")) == hold_out(ROWS)
    datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(str(tmp_path / "splits"))
    assert load_corpus(str(tmp_path / "splits")) == Corpus(hold_out(ROWS).train, hold_out(ROWS).validation, ROWS[:1])
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(LlmqatError, match=r"cannot read dataset .*one: .*; copy or save it again"):
        load_corpus(str(tmp_path / "one"))


def test_a_stream_is_read_only_as_far_as_needed(monkeypatch):
    read = []

    def rows(count):
        for number in range(count):
            read.append(number)
            yield {"text": f"{number}\n"}

    def hub(name, config, streaming):
        assert streaming
        splits = {"train": 200_000, "test": 4}
        return {k: datasets.IterableDataset.from_generator(rows, gen_kwargs={"count": n}) for k, n in splits.items()}

    monkeypatch.setattr(datasets, "load_dataset", hub)
    corpus = load_corpus("some/set", streaming=True, max_rows=500)
    assert len(read) < 15_000
    numbers = [int(text) for text in [*corpus.train, *corpus.validation]]
    assert len(set(numbers)) == len(numbers) == 475  # the test split is its own
    assert numbers != sorted(numbers)
    assert corpus.test == ["0\n", "1\n", "2\n", "3\n"]
    assert load_corpus("some/set", streaming=True, max_rows=500) == corpus
    monkeypatch.setattr("llmqat.data.corpus.STREAMED_ROWS", 40)
    assert len(load_corpus("some/set", streaming=True).train) == 36


@pytest.mark.parametrize("dataset", ["stdlib", "file"])
def test_local_data_is_not_streamed(tmp_path, dataset):
    path = dataset if dataset == "stdlib" else str(write(tmp_path / "a.jsonl", ROWS))
    with pytest.raises(LlmqatError, match=r"--streaming is for datasets of the Hub; .* is local: use --max-rows"):
        load_corpus(path, streaming=True)


def test_a_stream_that_breaks_off(monkeypatch):
    def rows():
        yield {"text": "x"}
        raise ConnectionError("reset by peer")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: {"train": stream})
    with pytest.raises(
        LlmqatError, match="cannot load dataset some/set from the Hub: reset by peer; without a network"
    ):
        load_corpus("some/set", streaming=True)
