"""The register of what is not public in other libraries is true, whole, and speaks up when something moves."""

import ast
import inspect
import re
import tomllib
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from accelerate import Accelerator
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from llmqat.compat.register import REGISTER, TESTED, find, leans_on
from llmqat.errors import LlmqatError
from tests.compat.helpers import move

ROOT = Path(__file__).parents[2]
MOVABLE = [(reliance, name) for reliance in REGISTER for name in reliance.names]
REGISTERED = {name.rpartition(".")[2] for _, name in MOVABLE}
# Private names of the classes that llmqat's own extend: a method of such a name takes the place of the library's.
EXTENDED = (nn.Module, LoraLayer, PreTrainedModel, Cache, CacheLayerMixin, Accelerator)
INHERITED = {
    name
    for kind in EXTENDED
    for name in (*dir(kind), *inspect.get_annotations(kind))
    if name.startswith("_") and not name.startswith("__")
}
NAMEDTUPLE = {"_replace", "_fields", "_asdict"}  # documented, and with an underscore only to leave names to the fields


def test_the_bounds_are_those_of_the_package():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    assert {f"{library}{bounds}" for library, bounds in TESTED.items()} <= set(dependencies)


@pytest.mark.parametrize("reliance", REGISTER, ids=lambda reliance: reliance.user)
def test_every_name_is_there(reliance):
    assert reliance.missing() == ""
    assert find(reliance.user).__doc__.startswith(reliance.why)
    assert (ROOT / reliance.test).exists()


@pytest.mark.parametrize(("reliance", "name"), MOVABLE, ids=[f"{r.user} {name}" for r, name in MOVABLE])
def test_a_name_that_moved_is_named(reliance, name, monkeypatch):
    """By whoever needs it, before anything is done, with the versions that have it."""
    user = find(reliance.user)
    move(monkeypatch, name)
    library, _, rest = name.partition(".")
    gone = f"{library} {version(library)} has no {rest}"
    message = f"{gone}, which llmqat needs; install {library}{TESTED[library]}, which it was tested with"
    with pytest.raises(LlmqatError, match=f"^{re.escape(message)}$"):
        user()


@pytest.mark.parametrize("name", ["torch.nn.gone.Module", "torch._C.gone", "transformers.gone.too", "json.gone"])
def test_what_never_was_is_missing(name, monkeypatch):
    monkeypatch.setattr("llmqat.compat.register.REGISTER", [])
    monkeypatch.setattr("llmqat.compat.register.version", lambda library: "1")

    @leans_on(name, test="")
    def user():
        raise AssertionError

    monkeypatch.setitem(TESTED, name.partition(".")[0], ">=1")
    with pytest.raises(LlmqatError, match=r"1 has no .*gone.*, which llmqat needs; install .*>=1, which it was tested"):
        user()


def private_uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and text of every name of a library that is not public."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
    own = own - INHERITED | NAMEDTUPLE
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr, own):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.FunctionDef) and node.name in INHERITED:
            yield node.lineno, f"def {node.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in REGISTERED | INHERITED:
            yield node.lineno, repr(node.value)
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("llmqat"):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, f"import {part}") for part in parts if is_private(part, set()))


def is_private(name: str, own: set[str]) -> bool:
    private = name.startswith("_") and not name.startswith("__") and name not in own
    return private or name in REGISTERED


def is_self(node: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    return ast.unparse(node) in ("self", "cls", "super()")


def test_private_names_are_used_in_compat_alone():
    found = [
        f"{path.relative_to(ROOT)}:{line} {text}"
        for path in sorted((ROOT / "llmqat").rglob("*.py"))
        if path.parent.name != "compat"
        for line, text in private_uses(ast.parse(path.read_text("utf-8")))
    ]
    assert not found, "not public: give it a function in llmqat/compat\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "model._tied_weights_keys = {}",
        "class A(nn.Module):\n    def _apply(self, fn): pass",
        "class A(nn.Module):\n    def f(self): self._buffers",
        "class A(nn.Module):\n    def f(self): super()._apply(None)",
        "setattr(layer, '_disable_adapters', True)",
        "from transformers.core_model_loading import rename_source_key",
        "from torch._C import anything",
        "torch._inductor.config",
        "weights.convert_peft_config_for_transformers",
    ],
)
def test_a_private_use_is_found(source):
    assert list(private_uses(ast.parse(source)))


def test_names_of_ones_own_pass():
    source = "class A:\n    def _own(self): self._kept = self._own()\nA()._own()._kept\npair._replace(a=1).__dict__"
    assert not list(private_uses(ast.parse(source)))
