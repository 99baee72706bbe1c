"""The register of names that are not public: who needs which, which test fails first, and what is said without them."""

import functools
import importlib
import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ParamSpec, TypeVar

from llmqat.errors import LlmqatError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# The bounds of pyproject.toml, which `make test-oldest` and `make test` ran with.
TESTED = {
    "torch": ">=2.13,<2.14",
    "transformers": ">=5.23,<5.25",
    "peft": ">=0.20,<0.22",
    "accelerate": ">=1.10,<1.16",
}


@dataclass
class Reliance:
    """The names of a library that one function leans on.

    Attributes:
        names: dotted paths, which start with the library.
        user: dotted path of the function.
        why: what the function does, its docstring's first line.
        test: the test that fails first when one of them moves.
        native: whether the native path needs them: without them it is off, and the code of transformers runs.
        found: whether all of them have been found in this process.
    """

    names: tuple[str, ...]
    user: str
    why: str
    test: str
    native: bool
    found: bool = False

    def missing(self) -> str:
        """The first name that is gone, with its library and version; empty if all are there."""
        for name in self.names:
            library, _, rest = name.partition(".")
            if not _exists(name):
                return f"{library} {version(library)} has no {rest}"
        return ""

    def check(self) -> None:
        """Refuse to go on without one of the names.

        Raises:
            LlmqatError: naming it, the version, and those that have it.
        """
        missing = self.missing()
        if missing:
            library = self.names[0].partition(".")[0]
            raise LlmqatError(
                f"{missing}, which llmqat needs; install {library}{TESTED[library]}, which it was tested with"
            )
        self.found = True


REGISTER: list[Reliance] = []


def leans_on(
    *names: str, test: str, native: bool = False
) -> Callable[[Callable[Arguments, Result]], Callable[Arguments, Result]]:
    """Register a function that leans on `names` of a library; its first call checks that they are there.

    Args:
        names: dotted paths from the library down. The last part may be an attribute of instances, which its class only
            annotates, or its module only mentions.
        test: the test that fails first when one of them moves.
        native: whether the native path needs them.
    """

    def register(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
        user, why = f"{function.__module__}.{function.__qualname__}", (function.__doc__ or "").partition("\n")[0]
        reliance = Reliance(names, user, why, test, native)
        REGISTER.append(reliance)

        @functools.wraps(function)
        def checked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
            if not reliance.found:
                reliance.check()
            return function(*args, **kwargs)

        return checked

    return register


def find(name: str) -> Any:
    """The module, class or function of a dotted path.

    Raises:
        AttributeError: if there is none.
    """
    library, *parts = name.split(".")
    return functools.reduce(_member, parts, importlib.import_module(library))


def _member(owner: Any, name: str) -> Any:
    if inspect.ismodule(owner) and not hasattr(owner, name):
        with suppress(ImportError):
            return importlib.import_module(f"{owner.__name__}.{name}")
    return getattr(owner, name)


def _exists(name: str) -> bool:
    try:
        find(name)
    except AttributeError:
        return _is_of_instances(name)
    return True


def _is_of_instances(name: str) -> bool:
    """Whether only instances have an attribute: its class annotates it, or its module asks for it by name."""
    owner, _, last = name.rpartition(".")
    with suppress(AttributeError, OSError, TypeError):  # the owner is gone too, or has no source
        thing = find(owner)
        if inspect.isclass(thing):
            return last in inspect.get_annotations(thing)
        return f'"{last}"' in inspect.getsource(thing)
    return False
