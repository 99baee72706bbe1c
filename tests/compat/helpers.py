"""Libraries in which a name has moved."""

import importlib
import inspect
import pkgutil
import sys

import llmqat.compat
from llmqat.compat.caches import cache_name
from llmqat.compat.register import REGISTER, find

for module in pkgutil.iter_modules(llmqat.compat.__path__):
    importlib.import_module(f"llmqat.compat.{module.name}")


class Gone:
    """An attribute that neither a class nor its instances have."""

    def __get__(self, *_):
        raise AttributeError("it has moved")


def move(monkeypatch, name: str) -> None:
    """Let a name be gone, as in a version of its library that has moved it."""
    owner, _, last = name.rpartition(".")
    thing = find(owner)
    if last in getattr(thing, "__annotations__", {}):
        monkeypatch.delitem(thing.__annotations__, last)
    elif not hasattr(thing, last):
        source = inspect.getsource(thing)
        monkeypatch.setattr(inspect, "getsource", lambda _: source.replace(f'"{last}"', ""))
    if last in vars(thing) or last in getattr(thing, "_config", {}):  # the latter of torch, no attributes of the module
        monkeypatch.delattr(thing, last)
    elif hasattr(thing, last):  # inherited, maybe from a class written in C
        monkeypatch.setattr(thing, last, Gone())
    if inspect.ismodule(thing):
        monkeypatch.setitem(sys.modules, name, None)
    for reliance in REGISTER:
        monkeypatch.setattr(reliance, "found", False)
    cache_name.cache_clear()
