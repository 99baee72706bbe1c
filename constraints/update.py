"""Resolve the two files beside this script anew from pyproject.toml: `tested.txt` and `oldest.txt`.

    python constraints/update.py        # or `make constraints`, after a bound has moved; needs the package index

`tested.txt` holds the newest releases within the bounds, for everything that pyproject.toml names, `oldest.txt` the
lower bounds themselves. Both name every package that is installed along, so that pip finds a year from now what the
tests ran with. They are resolved with the oldest Python that pyproject.toml allows, and hold no local parts of versions
(`+cpu`): which build of torch that is depends on the machine.
"""

import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent

# Every entry of pyproject.toml reads `name>=lower,<upper`, and may name the only system it is for.
REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)>=(?P<lower>[0-9.]+),<(?P<upper>[0-9.]+)(; sys_platform == '\w+')?")

HEADERS = {
    "tested.txt": "# The newest releases that pyproject.toml allows, as tested.",
    "oldest.txt": "# The lower bounds of pyproject.toml, and what goes with them, as `make test-oldest` runs.",
}


class Requirement(NamedTuple):
    """An entry of pyproject.toml: a package by its normalized name, its oldest version and the first one beyond."""

    name: str
    lower: str
    upper: str


def normalized(name: str) -> str:
    """A package's name as indexes compare names: lower case, runs of `-`, `_` and `.` as one `-` (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parsed(entry: str) -> Requirement:
    """The parts of `name>=lower,<upper`; any other form is refused."""
    match = REQUIREMENT.fullmatch(entry)
    if match is None:
        raise SystemExit(f"pyproject.toml: {entry!r} has to read name>=lower,<upper, so that both ends can be tested")
    return Requirement(normalized(match["name"]), match["lower"], match["upper"])


def requirements(project: dict, extras: Iterable[str]) -> list[Requirement]:
    """What the `[project]` table requires with the named extras, each package once."""
    entries = [
        *project["dependencies"],
        *(entry for extra in extras for entry in project["optional-dependencies"][extra]),
    ]
    return list(dict.fromkeys(parsed(entry) for entry in entries))


def resolve(wanted: list[str]) -> dict[str, str]:
    """Name -> version of all that pip would install for `wanted` into an empty environment; nothing is installed."""
    command = ["-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *wanted]
    done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit("pip finds no such set of packages: its reason is above; move the bound in pyproject.toml")
    packages = [package["metadata"] for package in json.loads(done.stdout)["install"]]
    return {normalized(package["name"]): package["version"].partition("+")[0] for package in packages}


def lines(name: str, pins: dict[str, str]) -> str:
    """The text of a constraints file: its header, then one `package==version` a line, sorted."""
    python = "{}.{}".format(*sys.version_info)
    origin = f"# Written by constraints/update.py with Python {python}: edit pyproject.toml and run that instead."
    pinned = [f"{package}=={version}" for package, version in sorted(pins.items())]
    return "\n".join([HEADERS[name], origin, *pinned, ""])


def main() -> None:
    """Write both files, after both have been resolved."""
    project = tomllib.loads((HERE.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    python = project["requires-python"].removeprefix(">=")
    if python != "{}.{}".format(*sys.version_info):
        raise SystemExit(f"run it with Python {python}, the oldest that pyproject.toml allows")
    newest = requirements(project, project["optional-dependencies"])
    oldest = requirements(project, ["test"])
    pins = {
        "tested.txt": resolve([f"{entry.name}>={entry.lower},<{entry.upper}" for entry in newest]),
        "oldest.txt": resolve([f"{entry.name}=={entry.lower}" for entry in oldest]),
    }
    for name, versions in pins.items():
        (HERE / name).write_text(lines(name, versions), encoding="utf-8")


if __name__ == "__main__":
    main()
