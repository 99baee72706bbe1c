"""The register of what is not public in other libraries is true, and caches are found under every name."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from llmqat import compat
from llmqat.compat import (
    REGISTER,
    Reliance,
    cache_name,
    cache_of,
    captures_outputs,
    generate_cache_name,
    give_cache,
    output_with_cache,
    refuse_unknown_caches,
    unknown_transformers,
)
from llmqat.errors import LlmqatError

ROOT = Path(__file__).parent.parent
# Private in name only: documented ways to write a Module or to change a NamedTuple.
OWN = {"_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks", "_replace", "_fields"}


def found(reliance: Reliance) -> object:
    """What a dotted name stands for; an attribute of instances is looked for in the text of its module."""
    parts = reliance.name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            thing: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(thing, part) and f".{part}" in inspect.getsource(thing):
                return part
            thing = getattr(thing, part)
        return thing
    raise ModuleNotFoundError(reliance.name)


@pytest.mark.parametrize("reliance", REGISTER, ids=lambda r: r.name)
def test_each_is_there_and_used(reliance):
    found(reliance)
    assert reliance.name.rsplit(".", 1)[-1] in (ROOT / reliance.used_in).read_text("utf-8"), reliance.used_in
    assert (ROOT / reliance.test).exists()
    assert reliance.why


def test_nothing_else_is_leaned_on():
    """Every private name that llmqat takes from a module it imports, or from an object that is not its own."""
    known = {reliance.name.rsplit(".", 1)[-1] for reliance in REGISTER} | OWN
    strangers = []
    for path in sorted((ROOT / "llmqat").rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assigned = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and is_self(node.value)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
                continue
            if is_self(node.value) or node.attr in known | defined | assigned or node.attr == "_C":
                continue
            strangers.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert not strangers, "not public, and not in llmqat/compat.py:\n" + "\n".join(strangers)


def is_self(node: ast.expr) -> bool:
    """Whether an expression is `self`, `cls` or `super()`."""
    return ast.unparse(node) in ("self", "cls", "super()")


def test_the_name_is_that_of_the_signature():
    assert cache_name(lambda cache=None: None) == "cache"
    assert cache_name(lambda ids, past_key_values=None: None) == "past_key_values"
    assert cache_name(lambda ids: None) is None
    assert generate_cache_name() in compat.CACHE_NAMES


def test_a_cache_is_found_under_every_name():
    cache = DynamicCache()
    assert cache_of({"cache": cache}) is cache_of({"past_key_values": cache, "cache": None}) is cache
    assert cache_of({}) is None
    with pytest.raises(LlmqatError, match="cache and past_key_values are two different caches; give one of them"):
        cache_of({"cache": cache, "past_key_values": DynamicCache()})


def test_a_cache_is_given_under_one_name():
    arguments = {"past_key_values": 1, "use_cache": True}
    give_cache(lambda cache: None, arguments, 2)
    assert arguments == {"cache": 2, "use_cache": True}
    with pytest.raises(LlmqatError, match="names its cache neither cache nor past_key_values; install a version"):
        give_cache(lambda ids: None, {}, 2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"memory": DynamicCache()},
        {"cache_params": (1,)},
        {"past": torch.ones(1)},
        {"past_key_value": ()},
        {"cache_position": torch.arange(3)},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_looks_like_a_cache_is_refused(arguments):
    with pytest.raises(LlmqatError, match=f"{next(iter(arguments))} is no argument of this model; give a key-value"):
        refuse_unknown_caches(arguments)
    refuse_unknown_caches({"return_legacy_cache": False, "output_attentions": True, "past": None})


def test_outputs_carry_the_cache():
    hidden, cache = torch.ones(1, 1, 2), DynamicCache()
    output = output_with_cache(hidden, cache)
    assert output.last_hidden_state is hidden
    assert output[generate_cache_name()] is cache


def test_a_transformers_that_is_not_recognised(monkeypatch):
    assert unknown_transformers() == ""
    monkeypatch.setattr(compat, "CACHE_NAMES", ("memory",))
    cache_name.cache_clear()
    try:
        assert "names its cache neither memory" in unknown_transformers()
        with pytest.raises(LlmqatError, match="install a version that llmqat was tested with"):
            generate_cache_name()
    finally:
        cache_name.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr("transformers.GenerationMixin.generate", lambda self: None)
    assert "takes no custom_generate" in unknown_transformers()


def test_hooks_that_transformers_leaves_are_known(tiny_llama):
    model = tiny_llama()
    with torch.no_grad():
        model(torch.arange(4)[None], output_hidden_states=True)
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    assert hooks
    assert all(map(captures_outputs, hooks))
    assert not captures_outputs(print)
