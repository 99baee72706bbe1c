import gzip
import json
from dataclasses import replace

import datasets
import pytest

from llmqat.data.corpus import load_corpus
from llmqat.data.named_sets import NAMED_SETS, named_set
from llmqat.data.splits import Corpus, hold_out
from llmqat.errors import LlmqatError


def test_a_corpus_holds_what_papers_score(papers_hub):
    wiki = [papers_hub[f"wikitext2 {split}"] for split in ("train", "validation", "test")]
    assert "" in wiki[2]  # empty rows stay
    assert load_corpus("wikitext2") == Corpus(*wiki)
    train, validation, test = (papers_hub[f"ptb {split}"] for split in ("train", "validation", "test"))
    assert load_corpus("ptb-new") == Corpus(train, validation, test)
    rest = hold_out(train)
    assert load_corpus("ptb") == Corpus(rest.train, rest.validation, validation)  # the scored split chooses nothing
    rest = hold_out(papers_hub["c4 train"])
    expected = Corpus(rest.train, rest.validation, papers_hub["c4 validation"])
    assert load_corpus("c4") == load_corpus("c4-new") == expected


def test_training_rows_are_limited_and_scored_ones_are_not(papers_hub, monkeypatch):
    assert NAMED_SETS["c4"].train_rows == 20_000
    monkeypatch.setitem(NAMED_SETS, "c4", replace(NAMED_SETS["c4"], train_rows=25))
    for max_rows, count in ((None, 25), (20, 20), (30, 25)):
        corpus, expected = load_corpus("c4", max_rows=max_rows), hold_out(papers_hub["c4 train"][:count])
        assert corpus == Corpus(expected.train, expected.validation, papers_hub["c4 validation"])


def test_a_local_file_goes_before_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert named_set("c4") is NAMED_SETS["c4"]
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "a.txt").write_text("one\n" * 100)
    assert named_set("c4") is None
    assert load_corpus("c4").train == ["one\n" * 90]


@pytest.mark.parametrize(("options", "name"), [({"streaming": True}, "--streaming"), ({"rows": "chat"}, "--rows chat")])
def test_what_does_not_apply(papers_hub, options, name):
    with pytest.raises(LlmqatError, match=rf"c4 is read as papers read it, without {name}; .* \(allenai/c4\)"):
        load_corpus("c4", **options)


def test_without_a_network(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(LlmqatError, match="cannot load dataset allenai/c4 from the Hub: no network; without a network"):
        load_corpus("c4")


def test_files_are_found_as_they_lie_on_the_hub(tmp_path, monkeypatch):
    """The library reads a directory with the layout of the repository."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    c4, ptb = tmp_path / "c4", tmp_path / "ptb"
    (c4 / "en").mkdir(parents=True)
    for name, first in (("validation.00000-of-00008", "a"), ("validation.00001-of-00008", "b"), ("train.00000", "c")):
        rows = "".join(json.dumps({"text": f"{first}{i}", "url": ""}) + "\n" for i in range(3))
        (c4 / "en" / f"c4-{name}.json.gz").write_bytes(gzip.compress(rows.encode()))
    assert replace(NAMED_SETS["c4"], hub=str(c4)).texts("validation") == ["a0", "a1", "a2"]
    assert replace(NAMED_SETS["c4"], hub=str(c4)).texts("validation", 2) == ["a0", "a1"]
    for split in ("train", "test"):
        (ptb / "penn_treebank" / split).mkdir(parents=True)
        path = ptb / "penn_treebank" / split / "0000.parquet"
        datasets.Dataset.from_dict({"sentence": [split]}).to_parquet(str(path))
    assert replace(NAMED_SETS["ptb-new"], hub=str(ptb)).texts("test") == ["test"]
