"""A directory goes to the Hub, here to a double of it: in one commit, with a card, without what names this machine."""

import pytest
import torch
import yaml
from huggingface_hub import HfApi

from llmqat.errors import LlmqatError
from llmqat.formats.writer import save_packed
from llmqat.models.patcher import prepare
from llmqat.pipeline.export import export, metadata
from llmqat.pipeline.push import check_name, push_to_hub
from llmqat.scheme import QuantScheme


class Hub:
    """What is asked of the API, and its files by name."""

    def __init__(self, refuses=False):
        self.made, self.files, self.refuses = [], {}, refuses

    def create_repo(self, name, private, exist_ok):
        if self.refuses:
            raise ConnectionError("401: no token")
        self.made.append((name, private, exist_ok))
        return f"https://hub/{name}"

    def create_commit(self, name, operations, commit_message):
        for operation in operations:
            with operation.as_file() as file:
                self.files[operation.path_in_repo] = file.read()


def front_matter(card):
    return yaml.safe_load(card.decode().split("---")[1])


@pytest.fixture
def directory(tiny_llama, tmp_path):
    model = tiny_llama()
    prepare(model, QuantScheme(4, 32), storage_dtype=torch.bfloat16)
    return save_packed(model, tmp_path / "packed")


def test_a_packed_directory(directory):
    (directory / "README.md").write_text("its own card")
    (directory / "checkpoint").mkdir()
    for name in ("checkpoint/model.safetensors", "notes.txt", "report.json"):
        (directory / name).write_text("x")
    hub = Hub()
    assert push_to_hub(directory, "me/model", hub) == "https://hub/me/model"
    assert hub.made == [("me/model", True, True)]
    expected = {
        "README.md",
        "config.json",
        "fingerprint.json",
        "generation_config.json",
        "model.safetensors",
        "report.json",
    }
    assert hub.files.keys() == expected
    assert hub.files["README.md"] == b"its own card"
    assert hub.files["model.safetensors"] == (directory / "model.safetensors").read_bytes()


def test_an_export_by_its_flag(directory, tmp_path, monkeypatch, call, capsys):
    hub = Hub()
    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, name=name, **options: getattr(hub, name)(*args, **options))
    flags = ["export", directory, "--to", "gptq", "--output", tmp_path / "out", "--push-to-hub"]
    assert call([*flags, "no name"]) == 1
    assert "--push-to-hub takes owner/model, got 'no name'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert call([*flags, "me/model-gptq"]) == 0
    assert capsys.readouterr().out.endswith("https://hub/me/model-gptq\n")
    assert front_matter(hub.files["README.md"]) == {"library_name": "transformers", "tags": ["llmqat", "gptq"]}
    assert (tmp_path / "out" / "README.md").read_bytes() == hub.files["README.md"]


@pytest.mark.parametrize(("license", "line"), [({}, True), ({"license": "mit"}, False)])
def test_an_export_carries_the_metadata_of_its_source(directory, tmp_path, license, line):
    index = [{"name": "m", "results": [{"metrics": [{"type": "perplexity", "value": 9.5}]}]}]
    carried = {"base_model": "a/b", "datasets": ["c/d"], "model-index": index, **license}
    front = yaml.safe_dump({"library_name": "transformers", "tags": ["compressed-tensors"], **carried})
    (directory / "README.md").write_text(f"---\n{front}---\n# Title\n\n---\n")
    export(directory, "gptq", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert front_matter(text.encode()) == {"library_name": "transformers", "tags": ["llmqat", "gptq"], **carried}
    assert ("\n# license: to be filled in" in text) == line


@pytest.mark.parametrize("text", ["no front matter", "---\n- a\n---\n", "---\n: [\n---\n"])
def test_a_card_of_somebody_else_is_left_alone(directory, text):
    (directory / "README.md").write_text(text)
    assert metadata(directory / "README.md") == {}


def test_a_run_by_its_flag(model_dir, text_file, tmp_path, monkeypatch, call, quantize_flags):
    hub = Hub()
    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(HfApi, name, lambda self, *args, name=name, **options: getattr(hub, name)(*args, **options))
    flags = ["quantize", *quantize_flags, "--model", model_dir, "--dataset", text_file, "--init", "rtn"]
    assert call([*flags, "--output", tmp_path / "out", "--push-to-hub", "me/model"]) == 0
    assert hub.made == [("me/model", True, True)]
    assert {"config.json", "model.safetensors", "report.json", "tokenizer.json"} <= hub.files.keys()
    assert hub.files["README.md"] == (tmp_path / "out" / "README.md").read_bytes()
    assert not [name for name in hub.files if name.startswith("checkpoint")]


def test_what_the_hub_refuses(directory):
    with pytest.raises(
        LlmqatError, match=r"cannot push .* to me/model: 401: no token; log in by `hf auth login`, or check"
    ):
        push_to_hub(directory, "me/model", Hub(refuses=True))
    with pytest.raises(LlmqatError, match="--push-to-hub takes owner/model, got 'model'"):
        check_name("model")
