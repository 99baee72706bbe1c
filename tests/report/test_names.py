from io import StringIO

import pytest
from rich.console import Console

from llmqat.config import from_dict, from_yaml
from llmqat.report.names import is_local, markdown, one_line, public_name, public_recipe
from llmqat.report.scoreboard import scoreboard


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("llama", "llama"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("wikitext:wikitext-2-raw-v1", "wikitext:wikitext-2-raw-v1"),
        ("/home/ada/models/tiny/", "tiny"),
        ("~/models/tiny", "tiny"),
        ("../ada/tiny", "tiny"),
        (r"C:\Users\ada\models\tiny", "tiny"),
        ("/", "local"),
        ("x" * 5000, "x" * 5000),
        ("a\0b", "a\0b"),
    ],
)
def test_a_path_is_published_by_its_last_part(name, shown):
    assert public_name(name) == shown


def test_a_folder_that_exists_is_local(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local("models/tiny")
    assert public_name("models/tiny") == "tiny"
    assert not is_local("models/other")


def test_a_recipe_is_published_without_folders():
    data = {"dataset": "/home/ada/my.txt", "calibration": "/home/ada/other.txt"}
    evaluation = {"also": "c4,/home/ada/p.txt", "baselines": "auto-round=/home/ada/env/bin/python"}
    recipe = {"model": "/home/ada/m", "output": "/home/ada/out", "data": data, "eval": evaluation}
    recipe["init"] = {"codes_from": "/home/ada/theirs"}
    values = public_recipe(from_dict(recipe)).to_dict()
    assert (values["model"], values["output"]) == ("m", "out")
    assert (values["data"]["dataset"], values["data"]["calibration"]) == ("my.txt", "other.txt")
    assert (values["eval"]["also"], values["eval"]["baselines"]) == ("c4,p.txt", "auto-round")
    assert values["init"]["codes_from"] == "theirs"
    assert "home" not in str(values)
    assert public_recipe(from_dict({})).data.calibration is public_recipe(from_dict({})).eval.also is None


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("plain, 4.5 % - of (it)", "plain, 4.5 % - of (it)"),
        ("a|b", r"a\|b"),
        ("`x` *y* _z_", r"\`x\` \*y\* \_z\_"),
        ("[a](http://b) <i>", r"\[a\](http://b) \<i\>"),
        ("one\n# two\r\x1b[0m", r"one # two \[0m"),
        ("&lt; ~~x~~ $y$", r"\&lt; \~\~x\~\~ \$y\$"),
    ],
)
def test_markdown_shows_text_as_it_is(text, escaped):
    assert markdown(text) == escaped


def test_one_line():
    assert one_line("a\n\tb\0c\x1b[31m") == "a b c [31m"


def test_rich_shows_marks_as_they_are():
    console = Console(record=True, width=100, file=StringIO())
    console.print(scoreboard({}, "[red]x[/] [/oops]"))
    assert "[red]x[/] [/oops]" in console.export_text()


def test_what_a_run_publishes_names_no_folder(finished, model_dir, text_file):
    """All but `checkpoint/`, which is what `--resume` needs on this machine."""
    shared = [path for path in finished.rglob("*") if path.is_file() and "checkpoint" not in path.parts]
    named = {"recipe.yaml", "report.json", "report.html", "README.md", "adapter_config.json", "model.safetensors"}
    assert named <= {path.name for path in shared}
    for path in shared:
        for folder in (model_dir.parent, text_file.parent, finished.parent):
            assert str(folder).encode() not in path.read_bytes(), path
    assert from_yaml(finished / "recipe.yaml").model == model_dir.name
