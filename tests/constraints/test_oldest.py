"""`make test-oldest` runs the tests of whatever uses a library that may move."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Import names of what pyproject.toml bounds, but for torch, of which both ends are one release, and for numpy, pyyaml
# and rich, which keep what is used of them from one major release to the next.
MOVING = {
    *("accelerate", "bitsandbytes", "compressed_tensors", "datasets", "gguf", "huggingface_hub", "peft"),
    *("safetensors", "tensorboard", "transformers", "trl"),
}


def selected(makefile: str) -> set[str]:
    """Paths under tests/ that `make test-oldest` hands to pytest."""
    (names,) = re.findall(r"^OLDEST_TESTS := \$\(addprefix tests/,([^)]*)\)", makefile, flags=re.MULTILINE)
    return set(names.replace("\\\n", " ").split())


def uses_a_moving_library(path: Path) -> bool:
    """Whether a file imports one of the libraries, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] in MOVING for name in names):
            return True
    return False


def untested(package: Path, tests: set[str]) -> list[str]:
    """Files and folders of the package that use a moving library, and of whose tests none are selected."""
    places = {path.relative_to(package).parts[0] for path in package.rglob("*.py") if uses_a_moving_library(path)}
    tested = {test.split("/")[0].removeprefix("test_") for test in tests}
    return sorted(places - tested)


def test_every_place_that_uses_a_moving_library_is_tested_on_the_oldest():
    tests = selected((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert all((ROOT / "tests" / test).exists() for test in tests)
    left_out = untested(ROOT / "llmqat", tests)
    assert not left_out, f"OLDEST_TESTS in the Makefile has no tests of {left_out}"


@pytest.mark.parametrize(
    "source",
    ["import datasets", "def f():\n    from transformers.cache_utils import Cache", "import json, peft.tuners as t"],
)
def test_an_untested_place_is_found(tmp_path, source):
    for name, text in {"nn/lora.py": source, "api.py": source, "quant/affine.py": "from .peft import x"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert untested(tmp_path, selected("OLDEST_TESTS := $(addprefix tests/,train \\\n  pipeline/test_run.py)")) == [
        "api.py",
        "nn",
    ]
    assert not untested(tmp_path, {"test_api.py", "nn/test_lora.py"})
