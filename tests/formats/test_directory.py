"""Nothing of another model stays where it would be read with this one, and nothing that is not llmqat's goes."""

import shutil

import pytest

from llmqat.errors import LlmqatError
from llmqat.formats import fingerprint
from llmqat.formats.verify import verify
from llmqat.formats.writer import save_packed

FOREIGN = r"which llmqat did not write and which would be read with the packed model; move them away"


def names(directory):
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_files_of_an_earlier_model_go(packed, tokenizer, tmp_path):
    """A chat template that stayed would be applied to a base model."""
    model, plain = packed
    chatty = type(tokenizer).from_pretrained(tokenizer.name_or_path) if tokenizer.name_or_path else tokenizer
    chatty.chat_template = {"default": "{{ messages }}", "tools": "{{ tools }}"}
    try:
        directory = save_packed(model, tmp_path / "out", chatty)
        assert {"chat_template.jinja", "additional_chat_templates/tools.jinja"} <= names(directory)
        (directory / "notes.txt").write_text("mine")
        chatty.chat_template = None
        assert names(save_packed(model, directory, chatty)) == names(plain) | {
            "tokenizer.json",
            "tokenizer_config.json",
            "notes.txt",
        }
        assert names(save_packed(model, directory)) == names(plain) | {"notes.txt"}
        assert verify(directory, logits=False).ok
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "adapter_config.json", "other.safetensors", "model.safetensors.index.json"]
)
def test_files_of_another_model_are_refused(packed, name):
    """Never half mixed, and never deleted."""
    model, directory = packed
    (directory / name).write_text("{}")
    before = {name: (directory / name).read_bytes() for name in names(directory)}
    with pytest.raises(LlmqatError, match=rf"holds {name}, {FOREIGN}"):
        save_packed(model, directory)
    assert before == {name: (directory / name).read_bytes() for name in names(directory)}


def test_a_float_model_is_not_written_over(packed, model_dir, tmp_path):
    directory = shutil.copytree(model_dir, tmp_path / "float")
    before = names(directory)
    with pytest.raises(LlmqatError, match=rf"holds config\.json, .*{FOREIGN}"):
        save_packed(packed[0], directory)
    assert names(directory) == before


def test_a_tokenizer_that_was_put_beside_the_model(packed, tokenizer):
    """Stays where none is written; another one is not mixed with it."""
    model, directory = packed
    tokenizer.save_pretrained(directory)
    (directory / "merges.txt").write_text("")
    assert verify(directory, logits=False).ok
    before = names(directory)
    assert names(save_packed(model, directory)) == before
    with pytest.raises(LlmqatError, match=rf"holds merges\.txt, {FOREIGN}"):
        save_packed(model, directory, tokenizer)


def test_a_write_that_was_cut_short_can_be_repeated(packed):
    model, directory = packed
    (directory / "config.json").unlink()
    (directory / "chat_template.jinja").write_text("of the write that was cut short")
    save_packed(model, directory)
    assert "chat_template.jinja" not in names(directory)


def test_a_fingerprint_of_an_earlier_version_is_llmqats_all_the_same(packed):
    model, directory = packed
    (directory / fingerprint.NAME).write_text('{"format": 1, "layers": {}}')
    (directory / "chat_template.jinja").write_text("")
    assert "chat_template.jinja" not in names(save_packed(model, directory))
