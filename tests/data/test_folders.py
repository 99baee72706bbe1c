import json

import datasets
import pytest

from llmqat.data import folders
from llmqat.data.corpus import load_corpus
from llmqat.data.folders import data_files, is_metadata
from llmqat.errors import LlmqatError

TEXTS = [f"text {i}" for i in range(80)]


def rows(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_a_cloned_dataset(tmp_path, capsys):
    """What the Hub keeps beside the data of a repository is no data."""
    (tmp_path / "data").mkdir()
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(tmp_path / "data/train-00000-of-00001.parquet"))
    for name in ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json", "croissant.json"):
        (tmp_path / name).write_text(json.dumps({"features": [{"text": "string"}]}))
    for name in ("README.txt", "LICENSE.txt", "requirements.txt", "tokenizer_config.json", "README.md", "load.py"):
        (tmp_path / name).write_text("about")
    for name in (".git/x.jsonl", ".cache/huggingface/y.json", "__MACOSX/z.txt"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("hidden")
    (tmp_path / ".gitattributes").write_text("*.parquet filter=lfs")
    (tmp_path / "._a.txt").write_text("of a Mac")
    corpus = load_corpus(str(tmp_path))
    assert [*corpus.train, *corpus.validation, *corpus.test] == TEXTS
    assert "11 other files left out, such as LICENSE.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["README.TXT", "Licence.txt", "CITATION.json", "special_tokens_map.json", "x.index.json"]
)
def test_metadata(tmp_path, name):
    assert is_metadata(tmp_path / name)
    assert not is_metadata(tmp_path / "train.json")
    (tmp_path / name).write_text("[]")
    with pytest.raises(LlmqatError, match=r"holds no file that llmqat can read; .*leaves out empty files and those ab"):
        load_corpus(str(tmp_path))
    rows(tmp_path / "train.jsonl")
    assert len(load_corpus(str(tmp_path)).train) == 72


def test_splits_saved_apart_are_not_taken_for_rows(tmp_path):
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(str(tmp_path / "one"))
    saved.save_to_disk(str(tmp_path / "two"))
    with pytest.raises(LlmqatError, match="holds no file that llmqat can read"):
        load_corpus(str(tmp_path))


def test_linked_folders_are_read_once(tmp_path):
    rows(tmp_path / "real/train.jsonl")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/a").symlink_to(tmp_path / "real")
    (tmp_path / "set/b").symlink_to(tmp_path / "real")
    (tmp_path / "set/loop").symlink_to(tmp_path / "set")
    assert [file.name for file in data_files(tmp_path / "set")] == ["train.jsonl"]


def test_a_folder_without_permission(tmp_path, monkeypatch):
    rows(tmp_path / "in/train.jsonl")

    def walk(folder, onerror, followlinks):
        onerror(PermissionError(13, "Permission denied", str(folder)))

    monkeypatch.setattr(folders.os, "walk", walk)
    with pytest.raises(LlmqatError, match=r"cannot read directory .*: Permission denied; check its permissions"):
        load_corpus(str(tmp_path))


def test_suffixes_in_capitals_and_empty_files(tmp_path, capsys):
    rows(tmp_path / "A.JSONL")
    (tmp_path / "b.txt").write_text("")
    (tmp_path / "c.parquet").write_text("")
    assert len(load_corpus(str(tmp_path)).train) == 72
    assert "2 other files left out, such as b.txt" in capsys.readouterr().err
    assert len(load_corpus(str(tmp_path / "A.JSONL")).train) == 72
