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


def selected(makefile: str) -> set[Path]:
    """Paths under tests/ that `make test-oldest` hands to pytest; of those of single tests, their file."""
    (names,) = re.findall(r"^OLDEST_TESTS := \$\(addprefix tests/,([^)]*)\)", makefile, flags=re.MULTILINE)
    return {Path(name.partition("::")[0]) for name in names.replace("\\\n", " ").split()}


def uses_a_moving_library(path: Path) -> bool:
    """Whether a file imports one of the libraries, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
        if any(name.split(".")[0] in MOVING for name in names):
            return True
    return False


def untested(root: Path, tests: set[Path]) -> list[str]:
    """Files of the package that use a moving library and whose tests are not selected.

    Where a file has no tests of its own, some of its folder do.
    """
    package, missing = root / "llmqat", []
    for path in filter(uses_a_moving_library, sorted(package.rglob("*.py"))):
        name = path.relative_to(package)
        own = name.with_name(f"test_{name.name}")
        if (root / "tests" / own).exists():
            tested = any(own.is_relative_to(test) for test in tests)
        else:
            tested = any(test.parts[0] == name.parts[0] for test in tests)
        if not tested:
            missing.append(name.as_posix())
    return missing


def test_every_file_that_uses_a_moving_library_is_tested_on_the_oldest():
    tests = selected((ROOT / "Makefile").read_text(encoding="utf-8"))
    assert all((ROOT / "tests" / test).exists() for test in tests)
    left_out = untested(ROOT, tests)
    assert not left_out, f"OLDEST_TESTS in the Makefile has no tests of {left_out}"


@pytest.mark.parametrize(
    "source",
    ["import datasets", "def f():\n    from transformers.cache_utils import Cache", "import json, peft.tuners as t"],
)
def test_an_untested_file_is_found(tmp_path, source):
    """Beside one whose folder is tested, and one that has no tests of its own."""
    files = dict.fromkeys(("llmqat/api.py", "llmqat/nn/lora.py", "llmqat/nn/shapes.py"), source)
    files |= {"llmqat/quant/affine.py": "from .peft import x", "tests/nn/test_lora.py": "", "tests/test_api.py": ""}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    others = "OLDEST_TESTS := $(addprefix tests/,train \\\n  nn/test_experts.py::test_one)"
    assert untested(tmp_path, selected(others)) == ["api.py", "nn/lora.py"]
    assert untested(tmp_path, selected("OLDEST_TESTS := $(addprefix tests/,test_api.py)")) == [
        "nn/lora.py",
        "nn/shapes.py",
    ]
    assert not untested(tmp_path, selected("OLDEST_TESTS := $(addprefix tests/,test_api.py nn)"))
