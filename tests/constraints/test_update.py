"""The constraints hold what pyproject.toml says, and the script that writes them reads pyproject.toml as pip does."""

import json
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from constraints import update

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# A minor release of these has changed what is used of them; elsewhere a major one would.
MOVED_BY_MINORS = {
    "triton",
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "huggingface-hub",
    "trl",
    "mypy",
}


def pins(name: str) -> dict[str, str]:
    """Package -> version, as a constraints file has them."""
    text = (ROOT / "constraints" / name).read_text(encoding="utf-8")
    return dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))


def entries(*extras: str) -> list[update.Requirement]:
    return update.requirements(PROJECT, extras or PROJECT["optional-dependencies"])


def ends_beyond(version: str, package: str) -> str:
    """The first version that was not tested, if `version` was: the next minor or the next major."""
    major, minor = Version(version).release[:2]
    return f"{major}.{minor + 1}" if package in MOVED_BY_MINORS or major == 0 else f"{major + 1}"


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.name)
def test_what_was_tested_lies_within_the_bounds_and_next_to_the_upper_one(entry):
    tested = pins("tested.txt")[entry.name]
    assert Version(entry.lower) <= Version(tested) < Version(entry.upper)
    assert entry.upper == ends_beyond(tested, entry.name), "an upper bound ends where the tested releases end"


@pytest.mark.parametrize("entry", entries("test"), ids=lambda entry: entry.name)
def test_oldest_is_the_lower_bound(entry):
    assert Version(pins("oldest.txt")[entry.name]) == Version(entry.lower), "run `make constraints`"


@pytest.mark.parametrize("name", ["tested.txt", "oldest.txt"])
def test_a_file_is_as_the_script_writes_it(name):
    text = (ROOT / "constraints" / name).read_text(encoding="utf-8")
    oldest_python = SimpleNamespace(version_info=tuple(map(int, PROJECT["requires-python"][2:].split("."))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(update, "sys", oldest_python)
        assert text == update.lines(name, pins(name))
    assert all(re.fullmatch(r"#.*|[a-z0-9-]+==[0-9a-z.]+", line) for line in text.splitlines()), (
        "names and versions only: no address, no option, no local part"
    )


@pytest.mark.parametrize("name", ["tested.txt", "oldest.txt"])
def test_make_installs_what_is_pinned(name):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    ours = [line for line in makefile.splitlines() if "pip install" in line and ("'.[" in line or line.endswith(" ."))]
    assert [line for line in ours if f"--constraint constraints/{name}" in line]
    assert all("--constraint constraints/" in line for line in ours)
    assert "PIP_CONSTRAINT" not in makefile, "that variable would put a machine's own constraints out of force"


@pytest.mark.parametrize(
    "entry", ["torch", "torch>=2", "torch==2.13", "torch>=2,!=2.1,<3", "torch>=2,<3; python_version>'3'"]
)
def test_an_entry_with_an_untested_end_is_refused(entry):
    with pytest.raises(SystemExit, match=re.escape(f"{entry!r} has to read name>=lower,<upper")):
        update.parsed(entry)


def test_entries_are_read_as_pip_reads_them():
    listed = [*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())]
    assert entries() == list(dict.fromkeys(map(update.parsed, listed)))
    for text in listed:
        ours, packaging = update.parsed(text), Requirement(text)
        assert ours.name == update.normalized(packaging.name)
        assert packaging.specifier == SpecifierSet(f">={ours.lower},<{ours.upper}")
        assert str(packaging.marker) in ("None", 'sys_platform == "linux"')
        assert (packaging.url, packaging.extras) == (None, set())


def test_names_are_compared_as_indexes_do():
    assert [update.normalized(name) for name in ("PyYAML", "lm_eval", "a.-_b")] == ["pyyaml", "lm-eval", "a-b"]


def run_main(monkeypatch, folder, report, *, python=(3, 11)):
    """`update.main` on a small project, pip being replaced by one that answers `report`; the commands it was given."""
    project = '[project]\nrequires-python = ">=3.11"\ndependencies = ["torch>=2.1,<3"]\n'
    (folder / "pyproject.toml").write_text(
        f'{project}[project.optional-dependencies]\ntest = ["pytest>=8,<9"]\ncheck = ["ruff>=1,<2"]\n'
    )
    (folder / "constraints").mkdir(exist_ok=True)
    commands = []

    def run(command, **_):
        commands.append(command)
        return SimpleNamespace(returncode=0 if report else 1, stdout=json.dumps({"install": report}))

    monkeypatch.setattr(update, "HERE", folder / "constraints")
    monkeypatch.setattr(update, "subprocess", SimpleNamespace(run=run, PIPE=subprocess.PIPE))
    monkeypatch.setattr(update, "sys", SimpleNamespace(executable=sys.executable, version_info=python))
    update.main()
    return commands


def test_both_files_are_written(monkeypatch, tmp_path):
    installed = [
        {"metadata": {"name": name, "version": version}} for name, version in [("Torch", "2.1+cpu"), ("A_b", "1.0rc1")]
    ]
    newest, oldest = run_main(monkeypatch, tmp_path, installed)
    assert newest[-3:] == ["torch>=2.1,<3", "pytest>=8,<9", "ruff>=1,<2"]
    assert oldest[-2:] == ["torch==2.1", "pytest==8"]
    for name in ("tested.txt", "oldest.txt"):
        assert (tmp_path / "constraints" / name).read_text() == update.lines(name, {"a-b": "1.0rc1", "torch": "2.1"})


def test_nothing_is_written_where_pip_finds_no_set(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="pip finds no such set of packages"):
        run_main(monkeypatch, tmp_path, [])
    assert not list((tmp_path / "constraints").iterdir())


def test_another_python_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match=re.escape("run it with Python 3.11")):
        run_main(monkeypatch, tmp_path, [], python=(3, 12))
